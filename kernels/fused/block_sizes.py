"""Block sizes, and how a shape is split: plain data and arithmetic, no triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

DECODE_ROWS = 16  # up to here a product is bound by reading the weight
MAX_GROUP_RANKS = 384
CORE_BLOCK, CORE_ROWS, CORE_CHUNK = 32, 64, 2048  # tile of dR, rows a step, rows a program


@dataclass(frozen=True)
class PrepConfig:
    """Blocks of the thin products: [block_m, block_k] of x a step."""

    block_m: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GemmConfig:
    """Blocks of the extended GEMM: [block_m, block_n] of y a program, block_k of the reduction a step.

    `registers` caps those of a thread, where the compiler would take a few more than let another program on the
    multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int
    registers: int | None = None

    def fitted(self, even: bool, dropout: bool) -> GemmConfig:
        """The same without spills: uneven lengths (masks) and dropout (two sums) need more room."""
        config = self if even and not dropout else replace(self, registers=None)
        if dropout:
            return replace(config, block_m=min(64, self.block_m), block_n=min(64, self.block_n))
        wide = self.block_m * self.block_n >= 128 * 128
        return config if even or not wide else replace(config, warps=max(8, self.warps))


# Of the gradient accumulator: a tile of G, and block_k tokens a step. Masks, and products in fp32, need registers.
GRADIENT = GemmConfig(block_m=64, block_n=128, block_k=32, group=8, warps=4, stages=3)
NARROW_GRADIENT = GemmConfig(block_m=64, block_n=64, block_k=32, group=8, warps=8, stages=2)
FP32_GRADIENT = GemmConfig(block_m=64, block_n=64, block_k=16, group=8, warps=8, stages=2)


def gradient_config(n: int, itemsize: int) -> GemmConfig:
    """Blocks of the gradient accumulator, for n columns of G and dy and x of `itemsize` bytes an element."""
    if itemsize > 2:
        return FP32_GRADIENT
    return GRADIENT if n % GRADIENT.block_n == 0 else NARROW_GRADIENT


DEQUANTIZE_BYTES = 1024  # of a weight in 4 bits, a program


def dequantize_config() -> PrepConfig:
    """Warps of the dequantization on its own."""
    return PrepConfig(0, 0, 4, 1)


def quantized_config(rows: int, itemsize: int) -> GemmConfig:
    """Blocks of the GEMM that dequantizes as it goes; a tile of W in fp32 has to fit the registers."""
    if itemsize > 2:
        return GemmConfig(16 if rows <= DECODE_ROWS else 32, 64, 16, 1, 4, 3)
    if rows <= DECODE_ROWS:
        return GemmConfig(16, 64, 64, 1, 4, 3)
    return GemmConfig(32 if rows <= 32 else 64, 64, 32, 1, 4, 3)


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def rank_parts(r: int) -> tuple[int, ...]:
    """One or two powers of two, 16 at least, whose sum covers r with the least padding: 96 = 64 + 32."""
    powers = [2**i for i in range(4, 9)]
    sums = [(p,) for p in powers] + [(p, q) for p in powers for q in powers if q < p]
    return min((parts for parts in sums if sum(parts) >= r), key=lambda parts: (sum(parts), len(parts)))


def _power_of_two_splits(programs: int, steps: int, wanted: int, least_steps: int) -> int:
    splits = 1
    while programs * splits < wanted and steps >= splits * 2 * least_steps:
        splits *= 2
    return splits


def prep_members(r: int, members: int) -> int:
    """How many members share one reading of x: their sums have to fit a multiprocessor's registers."""
    return max(1, min(members, MAX_GROUP_RANKS // sum(rank_parts(r))))


def prep_splits(row_blocks: int, steps: int) -> int:
    """How many programs share a row block's reduction; by the shape alone, so that every GPU sums in the same order."""
    return _power_of_two_splits(row_blocks, steps, wanted=192, least_steps=4 if row_blocks > 1 else 1)


def gemm_splits(tiles: int, steps: int, rows: int) -> int:
    """How many programs share a tile's reduction: several for a few tokens, where reading the weight is what counts."""
    if rows <= DECODE_ROWS:
        return _power_of_two_splits(tiles, steps, wanted=256, least_steps=4)
    return _power_of_two_splits(tiles, steps, wanted=64, least_steps=16)


def core_chunks(rows: int) -> int:
    """How many programs share a tile of dR."""
    return cdiv(rows, CORE_CHUNK)
