"""Files are written whole or not at all; large memory is in huge pages."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb.serving.bank import zeros_in_huge_pages
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
        if len(calls) == 2:  # the new folder's
            raise OSError("no space")
        replace(source, place)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no space"), files.replacing_folder(target) as folder:
        (folder / "three").write_text("three")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("way", "name"), [(files.replacing, "x.json"), (files.replacing_folder, "folder")])
def test_a_full_disk_names_the_file(tmp_path: Path, way: Any, name: str) -> None:
    with pytest.raises(OSError, match=f"{name} cannot be written: No space left") as caught, way(tmp_path / name):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


CPU = torch.device("cpu")


def mapping_of(address: int) -> tuple[str, str]:
    """Permissions of the mapping that holds an address, and its flags."""
    permissions, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
            permissions = rest[0] if inside else permissions
        elif inside and first == "VmFlags:":
            return permissions, " ".join(rest)
    raise LookupError(hex(address))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the kernel has no huge pages")
def test_large_memory_is_private_and_asks_for_huge_pages() -> None:
    found = zeros_in_huge_pages(1024, 2048, torch.float32, CPU)
    permissions, flags = mapping_of(found.data_ptr())
    assert permissions == "rw-p"  # shared memory has no huge pages unless the system's shmem_enabled says so
    assert "hg" in flags.split()


@pytest.mark.parametrize("rows", [0, 3, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_zero_and_hold_what_is_written(rows: int, dtype: torch.dtype) -> None:
    found = zeros_in_huge_pages(rows, 1000, dtype, CPU)
    assert (found.shape, found.dtype) == ((rows, 1000), dtype)
    assert not found.any()
    found += 1
    assert found.sum(dtype=torch.float64) == rows * 1000
