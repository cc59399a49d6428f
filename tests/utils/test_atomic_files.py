"""Files are written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

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


def test_a_folder_takes_anothers_place_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    for value in ("one", "two"):
        with files.replacing_folder(target) as folder:
            (folder / value).write_text(value)
    assert [path.name for path in target.iterdir()] == ["two"]
    replace, calls = os.replace, []

    def failing(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == 2:  # renames the new folder
            raise OSError("no space")
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no space"), files.replacing_folder(target) as folder:
        (folder / "three").write_text("three")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "scratch")
    with files.replacing_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "folder").is_symlink()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "scratch"]


@pytest.mark.parametrize(("way", "name"), [(files.replacing, "x.json"), (files.replacing_folder, "folder")])
def test_a_full_disk_names_the_file(tmp_path: Path, way: Any, name: str) -> None:
    with pytest.raises(OSError, match=f"{name} cannot be written: No space left") as caught, way(tmp_path / name):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
