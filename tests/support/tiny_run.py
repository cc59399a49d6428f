"""Words of the tiny tokenizer, and example files, for tests that run commands."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

WORDS = ["one", "two", "three", "four", "red", "blue", "green", "cat", "dog", "tree"]


def write_rows(file: Path, rows: Iterable[Mapping[str, object]]) -> str:
    """Write JSON Lines; return the file's path as a setting."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)
