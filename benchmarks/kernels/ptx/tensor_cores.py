"""Matrix instructions: which lane holds which element, ldmatrix and stmatrix, mma and wgmma.

Products are computed and added in fp64 and rounded to fp32 once. The hardware's order of additions in an instruction
is not documented: results may differ from a card's in the last bits, so tests compare within a tolerance. tf32 operands
are truncated, as the hardware reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import formats
from .formats import Array
from .program import KernelError
from .shared_memory import SharedMemory

# Element type -> dtype of its bits, and their conversion to the fp32 values that a tensor core reads
READ: dict[str, tuple[Any, Callable[[Array], Array]]] = {
    "bf16": (np.uint16, formats.from_bf16),
    "f16": (np.uint16, formats.from_f16),
    "tf32": (np.uint32, formats.truncate_tf32),
}
# Swizzled bytes per row -> the bits by which a row's number permutes its lines of 16 bytes
SWIZZLES = {128: 7, 64: 3, 32: 1}


def operand(registers: Array, kind: str) -> Array:
    """A [W, 16, K] from registers [W, 32 lanes, 4], or Bᵀ [W, 8, K] from 2 per lane: K is 16, or 8 for tf32.

    Each register of a lane is for one group of 8 rows and one half of the columns; in 16 bits it holds two neighbors.
    """
    dtype, convert = READ[kind]
    values, eights = convert(np.ascontiguousarray(registers).view(dtype)), registers.shape[2] // 2
    # row, column, half of the columns, eight rows, neighbor
    parts = values.reshape(len(registers), 8, 4, 2, eights, -1)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(len(registers), 8 * eights, -1)


def add_product(left: Array, right: Array, sums: Array) -> Array:
    """A B + sums: A [W, 16, K], B [W or 1, K, N], sums in fp32 as accumulators' registers [W, 32 lanes, N / 2]."""
    product = left.astype(np.float64) @ right.astype(np.float64)
    parts = product.reshape(len(left), 2, 8, -1, 4, 2)  # eight rows, row, eight columns, column, neighbor
    return (parts.transpose(0, 2, 4, 3, 1, 5).reshape(sums.shape) + sums).astype(np.float32)


def mma(shape: str, kinds: tuple[str, str], a: Array, b: Array, c: Array) -> Array:
    """D = A B + C of a warp: registers a [W, 32, 4], b [W, 32, 2], c [W, 32, 4] in fp32, as is D."""
    known = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("tf32",)}
    if kinds[0] != kinds[1] or kinds[0] not in known.get(shape, ()):
        raise KernelError(f"mma {shape} of {kinds[0]} and {kinds[1]} is not known to the interpreter")
    return add_product(operand(a, kinds[0]), operand(b, kinds[1]).mT, c)


def from_rows(rows: Array, transposed: bool) -> Array:
    """ldmatrix: registers [W, 32, n] from n matrices of 8 rows of 8 halves, [W, n, 8, 8] of uint16."""
    rows = np.ascontiguousarray(rows.mT if transposed else rows)
    return rows.view(np.uint32).reshape(*rows.shape[:2], 32).mT


def to_rows(registers: Array, transposed: bool) -> Array:
    """stmatrix: n matrices [W, n, 8, 8] of uint16 from registers [W, 32, n]."""
    rows = np.ascontiguousarray(registers.mT).view(np.uint16).reshape(len(registers), -1, 8, 8)
    return rows.mT if transposed else rows


def described(bits: int, rows: int, columns: int, size: int, major: bool) -> Array:
    """Byte addresses [rows (of M or N), columns (of K)] of a wgmma operand's elements of `size` bytes, from the 64
    bits of its matrix descriptor (PTX ISA, "Matrix Descriptor Format")."""
    mode = bits >> 62
    if mode == 0 or (bits >> 49) & 7:
        raise KernelError("a wgmma descriptor without swizzle, or with a base offset, is not known")
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}[mode]
    row, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if major:
        per_row = width // size
        address = start + (row // per_row) * leading + (k // 8) * stride
        address = address + (k % 8) * width + (row % per_row) * size
    else:
        address = start + (row // 8) * stride + (row % 8) * width + k * size
    return address ^ (((address >> 7) & SWIZZLES[width]) << 4)


def load_operand(shared: SharedMemory, bits: int, rows: int, columns: int, kind: str, major: bool) -> Array:
    """A wgmma operand [rows, columns] in fp32 from shared memory."""
    dtype, convert = READ[kind]
    size = np.dtype(dtype).itemsize
    addresses = described(bits, rows, columns, size, major)
    shared.use(addresses, size)
    return convert(shared.bytes.view(dtype)[addresses // size])
