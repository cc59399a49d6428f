"""Block sizes, and how a shape is split: plain data and arithmetic, no triton.

`plan` chooses the blocks of the low-rank products and the extended GEMM, from `tables/` (one JSON file per
architecture) or its defaults; the blocks of the other kernels are here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

DECODE_ROWS = 16  # one block of rows for tl.dot, whose sides are at least 16: only reading the weight matters
MAX_GROUP_RANKS = 384  # padded ranks of a group in one prep program: their fp32 sums are all in registers
# for dR: side of a tile, rows per step, rows per program. 8192 rows at rank 96 are 144 programs of eight steps; in
# chunks of 2048 rows they would be 36 programs of 32, on the 84 multiprocessors of an A6000.
CORE_BLOCK, CORE_STEP, CORE_CHUNK = 32, 64, 512
DEQUANTIZE_BYTES = 1024  # packed bytes of a 4-bit weight per program: 2048 elements


@dataclass(frozen=True)
class PrepConfig:
    """Blocks of the thin products: [block_m, block_k] of x per step."""

    block_m: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None  # limit per thread: with one, ptxas does not spill 8 or 16 bytes for more occupancy

    def fitted(self, even: bool) -> PrepConfig:
        """Return a config without spills: uneven lengths (masks) take eight warps."""
        return self if even else replace(self, warps=8)


@dataclass(frozen=True)
class GemmConfig:
    """Blocks of the extended GEMM: [block_m, block_n] of y per program, block_k of the reduction per step."""

    block_m: int
    block_n: int
    block_k: int
    group: int  # row blocks that share a sweep over the columns, for L2
    warps: int
    stages: int
    registers: int | None = None  # as in PrepConfig; 128 with four warps let four programs onto a multiprocessor

    def fitted(self, even: bool, dropout: bool, alone: bool = False, add: bool = False) -> GemmConfig:
        """Return a config without spills: uneven lengths (masks) and dropout (two K loops) take more registers.

        So uneven lengths take eight warps where the table has 128 x 128. Dropout takes eight warps, at most three
        stages and tiles of 64 x 64; for a layer `alone` with even lengths, four warps, and 64 x 128 unless it `add`s
        to dx. tests/kernels/test_static_report.py checks that the results do not spill.
        """
        if even and not dropout:
            return self
        is_large = self.block_m * self.block_n >= 128 * 128
        if not dropout:
            return replace(self, warps=max(8, self.warps)) if is_large else self
        config = replace(self, stages=min(3, self.stages), registers=None)
        if is_large and even and alone:
            return replace(config, block_m=64, block_n=64 if add else 128, warps=4)
        return replace(config, block_m=min(64, self.block_m), block_n=min(64, self.block_n), warps=8)


DEQUANTIZE = PrepConfig(0, 0, 4, 1)  # of separate dequantization, which has no blocks of x
# Of the gradient accumulator: here block_m x block_n is a tile of G [N, K], and block_k is tokens per step. Masks, and
# products in fp32, take registers: the last two have smaller tiles over more warps, which compile without a spill.
GRADIENT = GemmConfig(block_m=64, block_n=128, block_k=64, group=8, warps=4, stages=3)
NARROW_GRADIENT = GemmConfig(block_m=64, block_n=64, block_k=32, group=8, warps=4, stages=3)
FP32_GRADIENT = GemmConfig(block_m=64, block_n=64, block_k=16, group=8, warps=8, stages=2)


def is_executed(block_m: int, arch: str) -> bool:
    """False for blocks that compile to tcgen05, which nothing has executed yet: on sm_100 from 64 rows on."""
    return arch != "sm_100" or block_m < 64


def gradient_config(n: int, itemsize: int, arch: str) -> GemmConfig:
    """Blocks of the gradient accumulator, for n columns of G and dy and x of `itemsize` bytes per element."""
    narrow = FP32_GRADIENT if itemsize > 2 else NARROW_GRADIENT
    config = GRADIENT if itemsize <= 2 and n % GRADIENT.block_n == 0 else narrow
    return config if is_executed(config.block_m, arch) else replace(config, block_m=32, warps=4)


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


@lru_cache
def rank_blocks(r: int) -> tuple[int, ...]:
    """One or two powers of two, 16 at least, whose sum covers r with the least padding: 96 = 64 + 32."""
    powers = [2**i for i in range(4, 9)]  # tl.dot takes at least 16; r is at most 256
    covers = [(p,) for p in powers] + [(p, q) for p in powers for q in powers if q < p]
    return min((blocks for blocks in covers if sum(blocks) >= r), key=lambda blocks: (sum(blocks), len(blocks)))


def padded_rank(r: int) -> int:
    """The sum of the powers of two that cover a rank: columns of v and w."""
    return sum(rank_blocks(r))


def _power_of_two_splits(programs: int, steps: int, wanted: int, least_steps: int) -> int:
    """Double the splits until the grid has `wanted` programs or a split would have fewer than `least_steps` steps."""
    # `wanted` is a constant, not the number of multiprocessors: the order of a sum depends on the splits.
    splits = 1
    while programs * splits < wanted and steps >= splits * 2 * least_steps:
        splits *= 2
    return splits


def prep_members(r: int, members: int) -> int:
    """Number of members for which x is read once: their sums have to fit a multiprocessor's registers."""
    return max(1, min(members, MAX_GROUP_RANKS // padded_rank(r)))


def prep_splits(row_blocks: int, steps: int) -> int:
    """Number of programs that share a row block's reduction, by the shape alone: every GPU sums in the same order."""
    return _power_of_two_splits(row_blocks, steps, wanted=192, least_steps=4 if row_blocks > 1 else 1)


def gemm_splits(tiles: int, steps: int, rows: int) -> int:
    """Number of programs that share a tile's reduction, by the shape alone.

    With few rows, reading the weight is the bottleneck, which takes many programs. With more, only a small grid is
    split, into long ranges: each split writes and reads one more fp32 tile.
    """
    if rows <= DECODE_ROWS:
        return _power_of_two_splits(tiles, steps, wanted=256, least_steps=4)
    return _power_of_two_splits(tiles, steps, wanted=64, least_steps=16)
