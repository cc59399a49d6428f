"""Counts for a memory access and for an instruction, against lane-by-lane definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.ptx.program import parse_instruction
from benchmarks.kernels.ptx.work import Work, sectors, wavefronts

WARP = 32


def passes_by_hand(addresses: list[int], size: int) -> int:
    """One warp's wavefronts: for each 128 bytes of lanes, the number of different words in the busiest bank."""
    total, lanes = 0, min(WARP, 128 // size)
    for first in range(0, len(addresses), lanes):
        banks: dict[int, set[int]] = {}
        for address in addresses[first : first + lanes]:
            for byte in range(address, address + size):
                banks.setdefault(byte // 4 % 32, set()).add(byte // 4)
        total += max(len(words) for words in banks.values())
    return total


@given(
    size=st.sampled_from([2, 4, 8, 16]),
    places=st.lists(st.integers(0, 500), min_size=1, max_size=WARP),
    warps=st.integers(1, 3),
)
def test_wavefronts_and_sectors_are_those_of_the_definition(size: int, places: list[int], warps: int) -> None:
    addresses = np.array([size * (place + 3 * warp) for warp in range(warps) for place in places])
    of = np.repeat(np.arange(warps, dtype=np.int32), len(places))
    by_warp = [addresses[of == warp].tolist() for warp in range(warps)]
    assert wavefronts(addresses, size, of) == sum(passes_by_hand(one, size) for one in by_warp)
    touched = [{byte // 32 for address in one for byte in range(address, address + size)} for one in by_warp]
    assert sectors(addresses, size, of) == sum(map(len, touched))


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (16, 16, 4), (144, 16, 4), (128, 16, 32), (2, 2, 1)],
)
def test_strides_that_everybody_knows(stride: int, size: int, expected: int) -> None:
    addresses = np.arange(WARP) * stride
    assert wavefronts(addresses, size, np.zeros(WARP, np.int32)) == expected


REGISTERS = "{%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4}"
WGMMA = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, %p1, 1, 1, 0, 0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add.s32 %r1, %r2, %r3", Work(8)),
        ("add.s64 %rd1, %rd2, %rd3", Work(16)),
        ("mad.wide.u32 %rd1, %r2, 4, %rd3", Work(8)),
        ("mov.b32 %r1, %r2", Work()),
        ("ld.param.b64 %rd1, [kernel_param_0]", Work()),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]", Work(8)),
        ("fma.rn.f32 %f1, %f2, %f3, %f4", Work(8)),
        (f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {REGISTERS}", Work(8, tensor_flops=8 * 4096)),
        (f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {REGISTERS}", Work(8, tf32_flops=8 * 2048)),
        (WGMMA, Work(8, tensor_flops=2 * 2 * 64 * 128 * 16, shared_wavefronts=2 * (64 + 128) * 16 * 2 / 128)),
    ],
)
def test_an_instruction_of_eight_warps(text: str, expected: Work) -> None:
    work = Work()
    work.issue(parse_instruction(text), None, 256)
    assert work == expected


def test_warps_that_are_elsewhere_do_not_issue() -> None:
    work, active = Work(), np.zeros(128, bool)
    active[[0, 5, 70]] = True
    work.issue(parse_instruction("@%p1 add.s32 %r1, %r2, %r3"), active, 128)
    assert work == Work(2)
