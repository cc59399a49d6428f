"""Reading of text, JSON and safetensors files; every error names the file and what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]  # a JSON object
AGAIN = "copy it again from its source, or save the adapter again with model.save_pretrained(...)"


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file, with or without a byte order mark; a ValueError for another encoding."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data[:2] == b"\x1f\x8b":
            found = "a gzip archive: unpack it"
        elif data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            found = "UTF-16: save it as UTF-8"
        else:
            line = data.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{data[error.start]:02x} in line {line}, so Latin-1 or not text: save it as UTF-8"
        raise ValueError(f"{path}: expected UTF-8, got {found}") from None


def parse_json(text: str, where: str) -> Any:
    """Parse a user's JSON; raise a ValueError if it is invalid, too deep, or escapes something that is not text."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{where}: this is not valid JSON: {error.msg} at {place}") from None
    except (RecursionError, ValueError) as error:  # brackets nested deeply, a lone surrogate, thousands of digits
        raise ValueError(f"{where}: this is not valid JSON: {error}") from None
    return value


def read_json(path: str | os.PathLike[str]) -> Json:
    """Read a JSON file that holds an object; a ValueError for anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike[str], mapped: bool = True) -> dict[str, Tensor]:
    """Read a safetensors file's tensors, memory-mapped or all at once; raise a ValueError if it is damaged."""
    from safetensors.torch import load, load_file  # imports torch, which `lorasb --help` and settings do not need

    safetensors_header(path)  # with a better message than safetensors' own
    try:
        return load_file(str(path)) if mapped else load(Path(path).read_bytes())
    except (SafetensorError, RuntimeError, KeyError) as error:  # RuntimeError: a shape that its bytes do not fill
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None


def safetensors_header(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """Names of a safetensors file's tensors, and its metadata; a ValueError if it is missing, truncated or damaged."""
    if not Path(path).is_file():
        raise ValueError(f"expected {Path(path).name} in {Path(path).parent}, found none")
    try:
        with safe_open(str(path), framework="pt") as file:  # checks the file's length against its header
            return list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        what = f"is not a safetensors file, or is truncated or damaged ({error}; {os.path.getsize(path)} bytes)"
        raise ValueError(f"{path} {what}: {AGAIN}") from None
