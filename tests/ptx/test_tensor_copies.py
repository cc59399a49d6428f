"""Copies by descriptor and their mbarriers: where elements land, and what has to precede and follow a copy."""

from typing import Any

import numpy as np
import pytest

from benchmarks.kernels.ptx import KernelError
from benchmarks.kernels.ptx.global_memory import GlobalMemory
from benchmarks.kernels.ptx.program import Program
from benchmarks.kernels.ptx.tensor_copies import TensorMap
from benchmarks.kernels.ptx.thread_block import ThreadBlock

ROWS, COLUMNS = 12, 40
MATRIX = np.arange(ROWS * COLUMNS, dtype=np.uint16).reshape(ROWS, COLUMNS)
HEAD = """.version 8.7
.target sm_90a
.visible .entry kernel(
.param .align 64 .b8 kernel_param_0[128],
.param .u32 kernel_param_1,
.param .align 64 .b8 kernel_param_2[128]
)
.reqntid 64
{
mov.u32 %r0, %tid.x;
setp.eq.b32 %p1, %r0, 0;
mov.b32 %r20, kernel_param_0;
cvt.u64.u32 %rd1, %r20;
cvta.param.u64 %rd2, %rd1;
mov.b32 %r21, kernel_param_2;
cvt.u64.u32 %rd3, %r21;
mov.b32 %r1, 8192;
mov.b32 %r2, 0;
mov.b32 %r3, 0;
mov.b32 %r4, 8;
mov.b32 %r5, 32;
"""
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;\n"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 1024;\n"
COPY_IN = (
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd2, {%r5, %r4}], [%r1];\n"
)
WAIT = "{\nwaitLoop:\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r3;\n@!complete bra.uni waitLoop;\n}\n"
READ = "shl.b32 %r6, %r0, 4;\nld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r6];\n"
BARRIER, FENCE = "bar.sync 0;\n", "fence.proxy.async.shared::cta;\n"
WRITE = "st.shared.v4.b32 [%r6], {%r7, %r8, %r9, %r10};\n"
COPY_OUT = "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {%r5, %r4}], [%r2];\n"
COMMIT, DONE = "cp.async.bulk.commit_group;\n", "cp.async.bulk.wait_group 0;\n"
IN = INIT + BARRIER + EXPECT + COPY_IN + WAIT + READ
OUT = BARRIER + WRITE + FENCE + BARRIER + COPY_OUT + COMMIT + DONE


def executed(body: str, width: int = 32) -> tuple[ThreadBlock, np.ndarray[Any, Any]]:
    """A block after a copy from (8, 32) on, 16 rows and 32 columns (32 and 16 for width 32), and what it copied out."""
    program, memory = Program.parse(HEAD + body + "ret;\n}\n"), GlobalMemory(1 << 16)
    source = memory.allocate(MATRIX.view(np.uint8).reshape(-1))
    target = memory.allocate(np.zeros(MATRIX.nbytes, np.uint8))
    box = (32, 16) if width == 32 else (16, 32)
    maps = [TensorMap(start, MATRIX.shape, COLUMNS, box, 2, width) for start in (source, target)]
    block = ThreadBlock(program, memory, 16384, program.placed((maps[0], 0, maps[1])), 0, 1)
    block.run()
    return block, memory.content(target, MATRIX.nbytes).view(np.uint16).reshape(MATRIX.shape)


@pytest.mark.parametrize("width", [0, 32, 64])
def test_elements_land_swizzled_and_zeros_beyond_the_matrix(width: int) -> None:
    """16-byte chunks are where the PTX ISA draws them: row by row, every eight rows permuted the same way."""
    block, _ = executed(IN, width)
    rows, columns = (32, 16) if width == 32 else (16, 32)
    want = np.zeros((rows, columns), np.uint16)
    want[: ROWS - 8, : COLUMNS - 32] = MATRIX[8:, 32:]
    line, bits = 2 * columns, {0: 0, 32: 1, 64: 3}[width]
    for row, column in np.ndindex(rows, columns):
        address = row * line + 2 * column
        place = address ^ ((address >> 7) & bits) << 4
        assert block.shared.bytes.view(np.uint16)[place // 2] == want[row, column]


def test_what_is_copied_out_stays_in_the_matrix() -> None:
    _, written = executed(IN + OUT)
    want = np.zeros_like(MATRIX)
    want[8:, 32:] = MATRIX[8:, 32:]
    assert np.array_equal(written, want)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (IN.replace(INIT, ""), "there is no mbarrier"),
        (IN.replace(BARRIER, INIT, 1), "initialized twice"),
        (IN.replace(INIT, INIT.replace("%r1]", "%r0]")), "there is no mbarrier"),
        (IN.replace(BARRIER, ""), "without a barrier after its initialization"),
        (IN.replace(EXPECT, EXPECT * 2), "more arrivals than the mbarrier counts"),
        (IN.replace("1024", "512"), "a wait that nothing ends"),
        (IN.replace(COPY_IN, ""), "a wait that nothing ends"),
        (IN.replace(COPY_IN, COPY_IN * 2), "a cp.async is still writing"),
        (IN.replace(WAIT, ""), "a cp.async is still writing"),
        (IN.replace(WAIT + READ, ""), "still in flight at the end"),
        (IN.replace("@!complete bra.uni waitLoop;", ""), "a cp.async is still writing"),
        (IN.replace("mov.b32 %r3, 0", "mov.b32 %r3, 1").replace(EXPECT, "mov.b32 %r3, 1;\n" + EXPECT), "still writing"),
        (IN.replace("[%rd2, {", "[%rd3, {").replace("shared::cta.global", "shared::cta.local"), "does not know"),
        (IN.replace("[%rd2, {%r5, %r4}]", "[%rd2]"), "a copy without coordinates"),
        (IN.replace(COPY_IN, "add.s64 %rd2, %rd2, 4;\n" + COPY_IN), "something that is no descriptor"),
        (IN.replace(COPY_IN, "mov.b32 %r2, 16;\n" + COPY_IN), "which its swizzle does not divide"),
        (IN + OUT.replace(FENCE, ""), r"without fence\.proxy\.async"),
        (IN + OUT.replace(FENCE + BARRIER, FENCE), "without a barrier after the write"),
        (IN + OUT.replace(DONE, ""), "still in flight at the end"),
        (IN + OUT.replace(DONE, WRITE + DONE), "another warp|still reads"),
        (IN + OUT.replace(DONE, BARRIER + WRITE + DONE), "that a wgmma still reads"),
    ],
)
def test_every_fault_is_found(body: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        executed(body)
