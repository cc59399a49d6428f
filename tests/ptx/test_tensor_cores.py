"""Matrix instructions against fp64 products: fragments by PTX's tables, tf32 truncated, swizzles of wgmma."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from small_kernels import run

from benchmarks.kernels.ptx import KernelError, formats, tensor_cores
from benchmarks.kernels.ptx.shared_memory import SharedMemory

TO_BITS = {"bf16": formats.to_bf16, "f16": formats.to_f16}
FROM_BITS = {"bf16": formats.from_bf16, "f16": formats.from_f16}
FP32_SUM = 2e-6  # tolerance for sums of 16 products in fp64, rounded to fp32 once


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lane_of_a(row: int, column: int, size: int) -> tuple[int, int, int]:
    """Lane, register and half of A's element: PTX ISA, "Matrix fragments for mma.m16n8k16" and ".m16n8k8"."""
    n = 4 // size  # neighbors in a register
    return 4 * (row % 8) + column % (4 * n) // n, row // 8 + 2 * (column // (4 * n)), column % n


def lane_of_b(row: int, column: int, size: int) -> tuple[int, int, int]:
    n = 4 // size
    return 4 * column + row % (4 * n) // n, row // (4 * n), row % n


def registers(matrix: Any, count: int, place: Any, kind: str) -> Any:
    """A warp's registers [1, 32, count] of a matrix, element by element."""
    size = 4 if kind == "tf32" else 2
    packed = np.zeros((1, 32, count), np.uint32)
    bits = matrix.view(np.uint32) if size == 4 else TO_BITS[kind](matrix).astype(np.uint32)
    for row, column in np.ndindex(matrix.shape):
        lane, register, half = place(row, column, size)
        packed[0, lane, register] |= bits[row, column] << np.uint32(16 * half)
    return packed


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma_is_the_product(kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    a, b, c = random(16, depth), random(depth, 8, seed=1), random(16, 8, seed=2)
    packed = registers(a, 4, lane_of_a, kind), registers(b, 2, lane_of_b, kind)
    rows, columns = np.indices(c.shape)
    place = 0, 4 * (rows % 8) + columns // 2, 2 * (rows // 8) + columns % 2  # of an accumulator
    former = np.zeros((1, 32, 4), np.float32)
    former[place] = c
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    found = tensor_cores.mma(shape, (kind, kind), *packed, former)

    def read(m: Any) -> Any:
        if kind == "tf32":
            return (m.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return FROM_BITS[kind](TO_BITS[kind](m))

    want = read(a).astype(np.float64) @ read(b).astype(np.float64) + c
    np.testing.assert_allclose(found[place], want, rtol=FP32_SUM, atol=FP32_SUM)


def test_unknown_shapes_are_refused() -> None:
    nothing = np.zeros((1, 32, 4), np.uint32)
    with pytest.raises(KernelError, match="mma m16n8k32 of s8 and s8 is not known"):
        tensor_cores.mma("m16n8k32", ("s8", "s8"), nothing, nothing, nothing.view(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_go_to_registers_and_back(count: int, transposed: bool) -> None:
    rows = np.random.default_rng(0).integers(0, 2**16, (2, count, 8, 8)).astype(np.uint16)
    packed = tensor_cores.from_rows(rows, transposed)
    assert packed.shape == (2, 32, count)
    assert np.array_equal(tensor_cores.to_rows(packed, transposed), rows)
    for lane in range(32):  # PTX ISA: lane 4·i + j has elements 2j and 2j + 1 of row i
        i, j = lane // 4, lane % 4
        matrix = rows[0, 0].T if transposed else rows[0, 0]
        assert packed[0, lane, 0] == int(matrix[i, 2 * j]) | int(matrix[i, 2 * j + 1]) << 16


def test_ldmatrix_reads_rows_that_its_lanes_name() -> None:
    """x4 from shared memory: lane 8·k + i holds the address of row i of matrix k."""
    body = """
shl.b32 %r2, %r0, 4;
mad.wide.u32 %rd7, %r0, 16, %rd1;
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd7];
st.shared.v4.b32 [%r2], {%r10, %r11, %r12, %r13};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];
mad.wide.u32 %rd8, %r0, 16, %rd2;
st.global.v4.b32 [%rd8], {%r4, %r5, %r6, %r7};
"""
    halves = np.arange(256, dtype=np.uint16)
    found = run(body, [halves, np.zeros(128, np.uint32)])[1].reshape(32, 4)
    assert np.array_equal(found, tensor_cores.from_rows(halves.reshape(1, 4, 8, 8), False)[0])


@pytest.mark.parametrize(
    ("kind", "lane", "source"),
    [
        ("idx", "5", lambda t: 5),
        ("bfly", "3", lambda t: t ^ 3),
        ("down", "4", lambda t: t + 4 if t + 4 < 32 else t),
        ("up", "4", lambda t: t - 4 if t >= 4 else t),
    ],
)
def test_shuffles(kind: str, lane: str, source: Any) -> None:
    clamp = "0" if kind == "up" else "31"
    body = f"shl.b32 %r1, %r0, 3;\nshfl.sync.{kind}.b32 %r2, %r1, {lane}, {clamp}, -1;\n"
    body += "mad.wide.u32 %rd8, %r0, 4, %rd1;\nst.global.b32 [%rd8], %r2;"
    found = run(body, [np.zeros(64, np.uint32)], threads=64)[0].tolist()
    assert found == [8 * (t // 32 * 32 + source(t % 32)) for t in range(64)]


def descriptor(leading: int, stride: int, width: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2, 32: 3}[width] << 62


@pytest.mark.parametrize("major", [True, False])
@pytest.mark.parametrize("width", [128, 64, 32])
def test_operands_of_wgmma_are_swizzled(width: int, major: bool) -> None:
    """An operand [rows, 16] of halves laid out by hand as the PTX ISA draws it, then read through its descriptor."""
    rows, columns = width // 2 if major else 16, 16
    matrix = TO_BITS["bf16"](random(rows, columns))
    shared, mask = SharedMemory(16384), {128: 7, 64: 3, 32: 1}[width]
    for row, k in np.ndindex(rows, columns):
        # M or N (K if not `major`) runs along a line of `width` bytes; 8 lines are a core matrix, and others follow
        address = k * width + 2 * row if major else row * width + 2 * k
        chunk = address >> 4 & mask
        swizzled = address & ~(mask << 4) | (chunk ^ (address >> 7 & mask)) << 4
        shared.bytes.view(np.uint16)[swizzled // 2] = matrix[row, k]
    shared.initialized[:] = True
    bits = descriptor(8 * width * 2, 8 * width, width)
    found = tensor_cores.load_operand(shared, bits, rows, columns, "bf16", major)
    assert np.array_equal(found, FROM_BITS["bf16"](matrix))


MULTIPLY = """
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r2, %r3, %r4, %r5}, %rd9, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
DESCRIPTOR, WRITE = descriptor(128, 256, 32), "st.shared.v2.b32 [%r1], {%r0, %r0};"
BARRIER, FENCE, WAIT = "bar.sync 0;", "fence.proxy.async.shared::cta;", "wgmma.wait_group.sync.aligned 0;"
AFTER = "mov.b32 %r6, %f1; mov.b32 %r2, 1;"
PRODUCT = f"""
    shl.b32 %r1, %r0, 3;
    {WRITE}
    {BARRIER}
    {FENCE}
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    mov.b64 %rd9, {DESCRIPTOR};
    wgmma.fence.sync.aligned;
    {MULTIPLY.replace("%rd9, 1,", "%rd9, 0,")}
    {WAIT}
    {AFTER}
"""


@pytest.mark.parametrize(
    ("removed", "instead", "message"),
    [
        (WAIT, "mov.b32 %r7, %r2;" + WAIT, ""),  # an operand may be read
        (WAIT, MULTIPLY + WAIT, ""),  # and another product may be added
        (AFTER, BARRIER + WRITE, ""),  # after the wait, memory is free
        (WAIT, "mov.b32 %r6, %f1;", "read of %f1, which a wgmma in flight adds to"),
        (WAIT, "mov.b32 %f4, 0;", "write of %f4, which a wgmma in flight uses"),
        (WAIT, "mov.b32 %r5, 1;", "write of %r5, which a wgmma in flight uses"),
        (WAIT, WAIT.replace("0", "1"), "read of %f1"),
        (WAIT, BARRIER + WRITE, "write to shared memory that a wgmma still reads"),
        (WAIT + "\n    " + AFTER, "", "a wgmma is still in flight at the end"),
        (WRITE, "", "wgmma reads shared memory that nobody wrote"),
        (BARRIER, "", "without a barrier after the write"),
        (FENCE, "", r"without fence\.proxy\.async after the write"),
        (str(DESCRIPTOR), str(DESCRIPTOR + (4096 >> 4)), "descriptor out of shared memory"),
        (str(DESCRIPTOR), "0", "without swizzle"),
    ],
)
def test_wgmma_needs_a_barrier_a_fence_and_a_wait(removed: str, instead: str, message: str) -> None:
    with pytest.raises(KernelError, match=message) if message else nullcontext():
        run(PRODUCT.replace(removed, instead), [], threads=128)
