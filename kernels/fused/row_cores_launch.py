"""Products with an R for each row: from tensors to launches of `times_row_cores` and `row_core_gradients`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .block_sizes import CORE_BLOCK, PrepConfig, cdiv, padded_rank, rank_blocks
from .launcher import Launch, launch
from .operands import core_precision, on_device, precision, unit_rows
from .row_cores import row_core_gradients, times_row_cores

SHORT, LONG = PrepConfig(16, 0, 4, 2), PrepConfig(32, 0, 4, 2)  # a token a row, as in decoding, or a sequence
STEP = 32  # tokens of a step of dR

_copies: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakIdKeyDictionary()  # as it was read, and its copy


class RowProducts(NamedTuple):
    """R's [K, r, r] in any floating-point dtype, the place of each row's R among them or -1 [n], and s.

    `index` is int64 in [-1, K): on the CPU, or on the rows' device, where it is read by the kernel alone.
    """

    cores: Tensor
    index: Tensor
    scale: float

    def times(self, left: Tensor, transposed: bool, out: Tensor) -> Tensor:
        """out [M, padded r] = s·left_i R_kᵀ, or s·left_i R_k, of left [M, r], both of x's dtype; zero where k = -1."""
        if len(left) == 0 or len(self.cores) == 0:
            return out.zero_()
        tokens, left, cores = len(left) // len(self.index), unit_rows(left), _whole(self.cores)
        config = SHORT if tokens <= SHORT.block_m else LONG
        arguments = dict(
            source=left,
            cores=cores,
            places=_places(self.index, left.device),
            target=out,
            tokens=tokens,
            stride_source=left.stride(0),
            stride_core=cores.stride(0),
            stride_target=out.stride(0),
            scale=self.scale,
            TRANSPOSED=transposed,
            CORE_PRECISION=core_precision(left.dtype),
            R=cores.shape[1],
            R_BLOCKS=rank_blocks(cores.shape[1]),
            R_PADDED=out.shape[1],
            BLOCK_M=config.block_m,
            BLOCK_J=32 if out.shape[1] % 32 == 0 else 16,
        )
        with on_device(left):
            launch(Launch(times_row_cores, len(self.index) * cdiv(tokens, config.block_m), arguments, config))
        return out

    def gradients(self, t: Tensor, u: Tensor) -> Tensor:
        """dR_k = s·Σ t_iᵀ u_i [K, r, r] in R's dtype, over the rows of k in their order; zero if there are none."""
        index, gradients = self.index, self.cores.new_zeros(self.cores.shape)
        order = index.argsort(stable=True)[int((index < 0).sum()) :]  # rows by adapter, those of none left out
        if len(order) == 0 or len(t) == 0:
            return gradients
        present, counts = index[order].unique_consecutive(return_counts=True)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        r, width = gradients.shape[1], padded_rank(gradients.shape[1])
        t, u = unit_rows(t), unit_rows(u)
        arguments = dict(
            t=t,
            u=u,
            order=order.to(t.device, torch.int32),
            starts=starts.to(t.device, torch.int32),
            adapters=present.to(t.device, torch.int32),
            dcores=gradients,
            tokens=len(t) // len(index),
            stride_t=t.stride(0),
            stride_u=u.stride(0),
            scale=self.scale,
            PRECISION=precision(t.dtype),
            R=r,
            R_PADDED=width,
            BLOCK_R=CORE_BLOCK,
            BLOCK_M=STEP,
        )
        with on_device(t):
            launch(Launch(row_core_gradients, len(present) * cdiv(width, CORE_BLOCK) ** 2, arguments, LONG))
        return gradients


def _whole(cores: Tensor) -> Tensor:
    """The R's with contiguous entries, each in place; copied only if necessary."""
    return cores if cores.stride()[1:] == (cores.shape[2], 1) else cores.contiguous()


def _places(index: Tensor, device: torch.device) -> Tensor:
    """The index on the device: copied once for all layers of a step, which have the same tensor of it."""
    if index.is_cuda:
        return index
    seen, known = _copies.get(index, (None, None))
    if seen is None or known is None or known.device != device or not torch.equal(seen, index):
        seen, known = index.clone(), index.to(device, torch.int32)
        _copies[index] = seen, known
    return known
