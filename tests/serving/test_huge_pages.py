"""Memory in huge pages: asked of the system in a way that it can grant, zero, and small tensors from torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasb.serving.bank import zeros_in_huge_pages

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
