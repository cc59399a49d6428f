"""The GEMM by TMA, for Hopper: y_i = [x|v_i] [W_i|B_i]ᵀ + bias_i forward, dx = Σ_i [dy_i|w_i] [W_i;A_i] backward.

One thread copies an entire block by a descriptor, which pads it with zeros past the end of a tensor: addresses and
masks take no registers, and tiles of 128 x 256 fit. Base and adapter have separate loops. Programs are persistent:
program p of P takes tiles p, p + P, ... of all outputs. No sum is split, so that results do not depend on P. The launch
begins while the thin products still run (programmatic dependent launch), and waits for them before it reads v. dR is
computed by a launch of the extended GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat import find
from ..compat.triton import PRIVATE, has_tma, may_overlap
from .block_sizes import GemmConfig, cdiv
from .device_functions import gdc_wait
from .extended_gemm import tile_coordinates
from .launcher import Launch
from .operands import kernel_biases

TensorDescriptor = find(PRIVATE["TensorDescriptor"])
ALIGNMENT = 16  # bytes, of pointers and strides
MULTIPROCESSORS = 132  # of an H100, taken where there is no GPU


@triton.jit
def tma_gemm(
    lefts,
    rights,
    ys,
    biases,
    K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAIT_AT: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y_i = Σ_j left_ij right_ij + bias_i, with the transpose of right_ij if K_MAJOR.

    lefts, rights: a tuple of descriptors for each output, left_ij [M, K_ij] and right_ij [N_i, K_ij] if K_MAJOR, else
    [K_ij, N_i]; ys: descriptors [M, N_i]; biases: [N_i] if HAS_BIAS, else dummies. Blocks are the descriptors'. From
    j = WAIT_AT on, left_ij is written by the previous launch; None: that one has ended when this one begins.
    """
    BLOCK_M: tl.constexpr = ys[0].block_shape[0]
    BLOCK_N: tl.constexpr = ys[0].block_shape[1]
    BLOCK_K: tl.constexpr = lefts[0][0].block_shape[1]
    programs, M, before = tl.num_programs(0), ys[0].shape[0], 0
    for i in tl.static_range(len(ys)):
        N = ys[i].shape[1]
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range((tl.program_id(0) + programs - before % programs) % programs, tiles, programs):
            row, column, _, _ = tile_coordinates(tile, M, (N,), BLOCK_M, BLOCK_N, GROUP_M)
            m, n = row * BLOCK_M, column * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for j in tl.static_range(len(lefts[i])):
                if WAIT_AT is not None:
                    if j == WAIT_AT:
                        gdc_wait()
                for k in tl.range(0, lefts[i][j].shape[1], BLOCK_K):
                    right = rights[i][j].load([n, k]).T if K_MAJOR else rights[i][j].load([k, n])
                    acc = tl.dot(lefts[i][j].load([m, k]), right, acc)
            if HAS_BIAS:
                rn = n + tl.arange(0, BLOCK_N)
                acc += tl.load(biases[i] + rn, mask=rn < N, other=0.0)[None, :].to(tl.float32)
            ys[i].store([m, n], acc.to(ys[i].dtype))
        before += tiles


def call_of(
    pairs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    ys: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    config: GemmConfig,
    k_major: bool,
    base: int,
) -> Launch:
    """ys[i] = Σ_j left_ij right_ij (its transpose if k_major) + bias_i, for the pairs [i][j] of left and right.

    The first `base` pairs of an output do not depend on the previous launch.
    """
    m, n, k = config.block_m, config.block_n, config.block_k
    block, descriptor = [n, k] if k_major else [k, n], TensorDescriptor.from_tensor
    tiles = sum(cdiv(y.shape[0], m) * cdiv(y.shape[1], n) for y in ys)
    waits = may_overlap(tma_gemm) and base < len(pairs[0])  # one that never waits might end before the previous launch
    has_bias, filled = kernel_biases(biases, ys)
    arguments = dict(
        lefts=tuple(tuple(descriptor(left, [m, k]) for left, _ in some) for some in pairs),
        rights=tuple(tuple(descriptor(right, block) for _, right in some) for some in pairs),
        ys=tuple(descriptor(y, [m, n]) for y in ys),
        biases=filled,
        K_MAJOR=k_major,
        HAS_BIAS=has_bias,
        WAIT_AT=base if waits else None,
        GROUP_M=config.group,
    )
    # also for tensors on `meta`, whose launch will be repeated on the current device
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    programs = min(tiles, gpu.multi_processor_count if gpu else MULTIPROCESSORS)
    return Launch(tma_gemm, programs, arguments, config, overlaps=waits)


def has_descriptors(operands: Sequence[Tensor | None]) -> bool:
    """True if every operand can have a descriptor: 16 bits, contiguous rows, and 16 bytes of alignment."""
    return has_tma() and all(
        matrix is not None
        and matrix.element_size() == 2
        and matrix.stride(-1) == 1
        and matrix.stride(0) >= matrix.shape[1]  # not an expanded row
        and matrix.stride(0) % (ALIGNMENT // 2) == matrix.data_ptr() % ALIGNMENT == 0
        and matrix.numel() > 0
        for matrix in operands
    )
