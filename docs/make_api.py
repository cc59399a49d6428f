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
HEAD = """# API reference

Everything that is public, from its docstring. `python docs/make_api.py` writes this page; a test holds it to the code.
"""


def _unquoted(text: str) -> str:
    """A signature without the quotes of its annotations, which are strings; those of a literal stay."""
    return re.sub(r"Literal\[(\w+)\]", r'Literal["\1"]', re.sub("[\"']", "", text))


def signature(name: str, item: Any) -> str:
    """`name(arguments)`, with one argument per line if it is longer than 100 characters."""
    if not callable(item):
        return name
    if item is lorasb.LoRASBConfig:  # inherited fields depend on the installed PEFT
        inherited = {field.name for field in dataclasses.fields(item.__mro__[1])}
        own = (field.name for field in dataclasses.fields(item) if field.name not in inherited)
        return f"{name}(\n    " + ",\n    ".join(own) + ",\n)"
    # annotations are strings in the sources; their quotes are dropped
    text = _unquoted(f"{name}{inspect.signature(item)}")
    text = re.sub(r"<factory>", "...", text)
    if len(text) <= 100:
        return text
    arguments = [_unquoted(str(p)) for p in inspect.signature(item).parameters.values()]
    return f"{name}(\n    " + ",\n    ".join(arguments).replace("<factory>", "...") + ",\n)"


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
