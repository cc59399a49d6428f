"""Files are written completely or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorasb.utils import atomic_files as files
from lorasb.utils import plotting


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
    target, replace, calls = tmp_path / "folder", os.replace, []

    def replacing(source: Path, place: Path) -> None:
        """Replace as on Windows; the fifth time, there is no space."""
        calls.append(place)
        if len(calls) == 5 or Path(place).is_dir():
            raise OSError("no space" if len(calls) == 5 else "access is denied")
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", replacing)
    for value in ("one", "two"):
        with files.replacing_folder(target) as folder:
            (folder / value).write_text(value)
    assert [path.name for path in target.iterdir()] == ["two"]
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


def test_a_hard_link_keeps_the_mode_of_its_file(tmp_path: Path) -> None:
    """Its other name may belong to somebody who made it private."""
    (tmp_path / "private").write_text("x")
    (tmp_path / "private").chmod(0o600)
    with files.replacing(tmp_path / "link") as temporary:
        temporary.unlink()
        os.link(tmp_path / "private", temporary)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_an_error_without_a_number_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"x\.bin cannot be written: 5 requested and 3 written"),
        files.replacing(tmp_path / "x.bin"),
    ):
        raise OSError("5 requested and 3 written")  # as numpy's `tofile` does


@pytest.mark.parametrize("inside", ["", "runs/one"])
def test_a_file_in_the_folders_place_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match=r"expected a folder to write into, got .*file"),
        files.locked(tmp_path / "file" / inside),
    ):
        pytest.fail("locked")


def test_a_picture_has_the_name_of_any_file(tmp_path: Path) -> None:
    """Between two dollar signs matplotlib reads mathematics, and raises for `5_to_`."""
    figure, axes = plotting.canvas()
    plotting.save(figure, axes, "$5_to_$10.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
