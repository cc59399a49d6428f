"""Matrix instructions: which lane holds which element, ldmatrix and stmatrix, mma and wgmma.

Products are taken and added in fp64 and rounded to fp32 once. The hardware's order inside one instruction is not
documented: results may differ from a card's in the last bits, and tests compare within a tolerance. tf32 operands are
truncated, as the hardware reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np

from . import formats
from .faults import KernelError
from .formats import Array
from .shared_memory import SharedMemory

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4  # PTX's groupID and threadID_in_group
CORNERS_16 = ((0, 0), (8, 0), (0, 8), (8, 8))  # (row, column) of a's registers, m16n8k16
CORNERS_TF32 = ((0, 0), (8, 0), (0, 4), (8, 4))  # of m16n8k8
RESULT = ((0, 0), (0, 1), (8, 0), (8, 1))  # (row, column) of an accumulator's four registers
# Swizzled bytes per row -> the bits by which a row's number permutes its lines of 16 bytes
SWIZZLES = {128: 7, 64: 3, 32: 1}


def halves_of(kind: str) -> Callable[[Array], Array] | None:
    """The conversion of 16-bit operands to fp32."""
    return {"bf16": formats.from_bf16, "f16": formats.from_f16}.get(kind)


def operand_a(registers: Array, kind: str) -> Array:
    """A [W, 16, K] from registers [W, 32 lanes, 4]: K is 16, of tf32 8."""
    return _operand(registers, kind, CORNERS_TF32 if halves_of(kind) is None else CORNERS_16)


def operand_b(registers: Array, kind: str) -> Array:
    """B [W, K, 8] from registers [W, 32 lanes, 2]."""
    corners = ((0, 0), (0, 4 if halves_of(kind) is None else 8))
    return _operand(registers, kind, corners).transpose(0, 2, 1)


def _operand(registers: Array, kind: str, corners: tuple[tuple[int, int], ...]) -> Array:
    """The matrix [W, rows, K] whose row is a lane's group: of A, or of Bᵀ."""
    warps, convert, rows = len(registers), halves_of(kind), 8 + max(row for row, _ in corners)
    if convert is None:
        values, each = formats.truncate_tf32(registers)[..., None], 1
    else:
        values, each = convert(np.ascontiguousarray(registers).view(np.uint16)).reshape(warps, 32, -1, 2), 2
    found = np.empty((warps, rows, 8 * each), np.float32)
    for (i, (row, column)), half in product(enumerate(corners), range(each)):
        found[:, GROUP + row, each * IN_GROUP + column + half] = values[:, :, i, half]
    return found


def mma(shape: str, kinds: tuple[str, str], a: Array, b: Array, c: Array) -> Array:
    """D = A B + C of a warp: registers a [W, 32, 4], b [W, 32, 2], c [W, 32, 4] in fp32, and so D."""
    known = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("tf32",)}
    if kinds[0] != kinds[1] or kinds[0] not in known.get(shape, ()):
        raise KernelError(f"mma {shape} of {kinds[0]} and {kinds[1]} is not known to the interpreter")
    sums = np.empty((len(a), 16, 8), np.float32)
    for i, (row, column) in enumerate(RESULT):
        sums[:, GROUP + row, 2 * IN_GROUP + column] = c[:, :, i]
    left, right = operand_a(a, kinds[0]).astype(np.float64), operand_b(b, kinds[1]).astype(np.float64)
    with np.errstate(all="ignore"):
        sums = (left @ right + sums).astype(np.float32)
    return np.stack([sums[:, GROUP + row, 2 * IN_GROUP + column] for row, column in RESULT], 2)


def from_rows(rows: Array, transposed: bool) -> Array:
    """ldmatrix: registers [W, 32, n] from n matrices of 8 rows of 8 halves, [W, n, 8, 8] of uint16."""
    first, second = 2 * IN_GROUP, 2 * IN_GROUP + 1
    if transposed:
        low, high = rows[:, :, first, GROUP], rows[:, :, second, GROUP]
    else:
        low, high = rows[:, :, GROUP, first], rows[:, :, GROUP, second]
    words = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
    return np.moveaxis(words, 1, 2)


def to_rows(registers: Array, transposed: bool) -> Array:
    """stmatrix: n matrices [W, n, 8, 8] of uint16 from registers [W, 32, n]."""
    warps, _, count = registers.shape
    rows = np.zeros((warps, count, 8, 8), np.uint16)
    first, second = 2 * IN_GROUP, 2 * IN_GROUP + 1
    for i in range(count):
        low = (registers[:, :, i] & np.uint32(0xFFFF)).astype(np.uint16)
        high = (registers[:, :, i] >> np.uint32(16)).astype(np.uint16)
        if transposed:
            rows[:, i, first, GROUP], rows[:, i, second, GROUP] = low, high
        else:
            rows[:, i, GROUP, first], rows[:, i, GROUP, second] = low, high
    return rows


class Descriptor(NamedTuple):
    """Where wgmma's operand lies in shared memory."""

    start: int
    leading: int
    stride: int
    width: int

    @classmethod
    def decode(cls, bits: int, where: str) -> Descriptor:
        """From the 64 bits of the matrix descriptor (PTX ISA, "Matrix Descriptor Format")."""
        mode = bits >> 62
        if mode == 0 or (bits >> 49) & 7:
            raise KernelError(f"a wgmma descriptor without swizzle, or with a base offset, is not known, at {where}")
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return cls(start, leading, stride, {1: 128, 2: 64, 3: 32}[mode])

    def addresses(self, rows: int, columns: int, size: int, major: bool) -> Array:
        """Byte addresses [rows (of M or N), columns (of K)] of elements of `size` bytes."""
        row, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
        if major:
            per_row = self.width // size
            address = self.start + (row // per_row) * self.leading + (k // 8) * self.stride
            address = address + (k % 8) * self.width + (row % per_row) * size
        else:
            address = self.start + (row // 8) * self.stride + (row % 8) * self.width + k * size
        return address ^ (((address >> 7) & SWIZZLES[self.width]) << 4)


def load_operand(shared: SharedMemory, bits: int, rows: int, columns: int, kind: str, major: bool, where: str) -> Array:
    """A wgmma operand [rows, columns] in fp32 from shared memory."""
    convert = halves_of(kind)
    size = 4 if convert is None else 2
    addresses = Descriptor.decode(bits, where).addresses(rows, columns, size, major)
    shared.use(addresses, size, where)
    if convert is None:
        return formats.truncate_tf32(shared.bytes.view(np.uint32)[addresses // 4])
    return convert(shared.bytes.view(np.uint16)[addresses // 2])


def warpgroup_result(sums: Array, former: Array) -> Array:
    """D = sums [64, N] + former, as registers [128 threads, N / 2] of fp32."""
    result = np.empty_like(former)
    for warp in range(4):
        lanes = slice(32 * warp, 32 * warp + 32)
        for j in range(sums.shape[1] // 8):
            for i, (row, column) in enumerate(RESULT):
                part = sums[16 * warp + GROUP + row, 8 * j + 2 * IN_GROUP + column]
                with np.errstate(all="ignore"):
                    result[lanes, 4 * j + i] = (part + former[lanes, 4 * j + i]).astype(np.float32)
    return result
