"""Writes docs/api.md from the public docstrings: `python docs/make_api.py`. A test compares the page with the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import lorasb
import lorasb.functional

PAGE = Path(__file__).with_name("api.md")
FUNCTIONAL = ("lora_sb_linear", "lora_sb_linear_group", "quantized_linear", "dequantize")
METHODS = (lorasb.AdapterBank, lorasb.InitReport, lorasb.VLLMSampler)  # classes whose methods are listed, too
HEAD = """# API reference

The public functions and classes, from their docstrings. `python docs/make_api.py` writes this page; a test holds it to
the code.
"""


class _Source(str):
    """An annotation (a string at runtime), printed as code, without quotes."""

    __repr__ = str.__str__


def _shown(parameter: inspect.Parameter) -> str:
    annotated = parameter.annotation is not parameter.empty
    return str(parameter.replace(annotation=_Source(parameter.annotation)) if annotated else parameter)


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    return repr(field.default if factory is dataclasses.MISSING else factory())


def signature(name: str, item: Any, width: int = 100) -> str:
    """`name(arguments) -> result`, with one argument per line if it is longer than `width`."""
    arguments, result = _arguments(item)
    text = f"{name}({', '.join(arguments)}){result}"
    if len(text) <= width:
        return text
    return f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){result}"


def _arguments(item: Any) -> tuple[list[str], str]:
    """The arguments of a signature, `*` included, and ` -> result`, empty for a class."""
    if item is lorasb.LoRASBConfig:  # inherited fields, which come first, depend on the installed PEFT
        inherited = {field.name for field in dataclasses.fields(item.__mro__[1])}
        own = [field for field in dataclasses.fields(item) if field.name not in inherited]
        return ["*", *(f"{field.name}: {field.type} = {_default(field)}" for field in own)], ""
    found = inspect.signature(item)
    arguments, named = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            arguments.append("*")
        named = named or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        arguments.append(_shown(parameter))
    result = "" if inspect.isclass(item) or found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return arguments, result


def methods(item: type) -> list[str]:
    """A line for each public method and property of a class."""
    lines = []
    for name, member in vars(item).items():
        found = getattr(item, name)
        if name.startswith("_") or not (callable(found) or isinstance(member, property)):
            continue
        shown = signature(name, found, width=10_000) if callable(found) else name
        lines.append(f"- `{shown}`: {(inspect.getdoc(member) or '').partition(chr(10) * 2)[0]}")
    return ["Methods and properties:", "", *lines, ""]


def entry(name: str, item: Any) -> str:
    """The section of one public name."""
    lines = [f"## `{name}`", ""]
    if inspect.isclass(item) and dataclasses.is_dataclass(item) and "Config" not in item.__name__:
        lines += ["A dataclass.", ""]
    elif callable(item):
        lines += ["```text", signature(name, item), "```", ""]
    doc = inspect.getdoc(item) or ""
    first, _, details = doc.partition("\n\n")
    lines += [first, ""]
    if details.strip():
        lines += ["```text", details.strip(), "```", ""]
    if item in METHODS:
        lines += methods(item)
    return "\n".join(lines)


def page() -> str:
    """The text of docs/api.md."""
    names = [(f"lorasb.{name}", getattr(lorasb, name)) for name in sorted(lorasb.__all__)]
    names = [(name, item) for name, item in names if callable(item)]
    names += [(f"lorasb.functional.{name}", getattr(lorasb.functional, name)) for name in FUNCTIONAL]
    contents = "\n".join(f"- [{name}](#{re.sub(r'[^a-z0-9_]', '', name.lower())})" for name, _ in names)
    text = "\n".join([HEAD, contents, "", *(entry(*pair) for pair in names)])
    return textwrap.dedent(text).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
