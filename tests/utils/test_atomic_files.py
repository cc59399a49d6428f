"""Files are written whole: a failure leaves the old one and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasb.utils import atomic_files as files


def test_atomic_writes_keep_the_old_file_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(target, {"a": object()})
    with pytest.raises(ZeroDivisionError), files.replacing(target) as temporary:
        temporary.write_text(f"{1 / 0}")
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
