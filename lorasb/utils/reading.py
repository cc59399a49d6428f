"""Reading of text, JSON and safetensors files; every error names the file and what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
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
            found = f"byte 0x{data[error.start]:02x} in line {line}, as Latin-1 or no text has it: save it as UTF-8"
        raise ValueError(f"{path}: expected UTF-8, got {found}") from None


def parse_json(text: str, where: str) -> Any:
    """Parse a user's JSON; a ValueError if it is none, too deep, or has an escape that no text can hold."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where}: expected JSON, got brackets nested thousands deep") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected text, got a lone surrogate (\\ud800 to \\udfff)") from None
    except ValueError as error:
        raise ValueError(f"{where}: this is no valid JSON: {error}") from None
    return value


def read_json(path: str | os.PathLike[str]) -> Json:
    """Read a JSON file that holds an object; a ValueError for anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file; a ValueError if it is truncated or damaged."""
    from safetensors.torch import load_file  # imports torch, which `lorasb --help` and settings do without

    safetensors_header(path)  # with a better message than safetensors' own
    try:
        return load_file(str(path))
    except (SafetensorError, RuntimeError, KeyError) as error:  # RuntimeError: a shape that its bytes do not fill
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None


def safetensors_header(path: str | os.PathLike[str]) -> Json:
    """The header of a safetensors file, name -> {"dtype", "shape", "data_offsets"}; a ValueError if it is damaged."""
    size = os.path.getsize(path)
    length, header = _length_and_header(path)
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file, or its header is cut off ({size} bytes): save it again")
    for name, entry in header.items():
        if name != "__metadata__" and not _is_entry(entry):
            raise ValueError(f"{path} is damaged: its header has no shape and place for {name!r}: {AGAIN}")
    # Tensors are contiguous in the format, so the largest end offset is the length of the data.
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {expected} bytes, the file has {size}: {AGAIN}"
        )
    try:
        with safe_open(str(path), framework="pt"):  # checks shapes against places, which may overlap or leave gaps
            return header
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(one) is int and one >= 0 for one in [*shape, *offsets]):
        return False
    return bool(offsets[0] <= offsets[1] and math.prod(shape) < 2**62)


def _length_and_header(path: str | os.PathLike[str]) -> tuple[int, Any]:
    with open(path, "rb") as file:
        prefix = file.read(8)  # the header's length, uint64 little-endian; the JSON header and the tensors follow
        # Too short a file counts as a header over the limit, which is not read.
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        try:
            return length, json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else None
        except (ValueError, RecursionError):
            return length, None
