"""Operands that the launchers of all kernels share: the layers' tensors, workspaces, and layouts that kernels need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_sizes import padded_rank

INT32_LIMIT = 2**31
Arguments = dict[str, Any]  # of a kernel, by name


class Members(NamedTuple):
    """Layers that read the same x [M, n]: W_i [m_i, n], A_i [r, n], R_i [r, r], B_i [m_i, r], bias_i [m_i], s_i.

    All have the same rank and dtype, and either all or none have a weight.
    """

    weights: Sequence[Tensor | None]
    a: Sequence[Tensor]
    cores: Sequence[Tensor]
    b: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[float]

    @property
    def r(self) -> int:
        """The rank."""
        return self.a[0].shape[0]

    @property
    def width(self) -> int:
        """Columns of a member's v, w and t: the rank, padded."""
        return padded_rank(self.r)

    def select(self, indices: slice) -> Members:
        """Return some of the members."""
        return Members._make(field[indices] for field in self)

    def map(self, function: Callable[[Tensor], Tensor]) -> Members:
        """Return the members with a function applied to each tensor."""
        weights, biases = ([t if t is None else function(t) for t in field] for field in (self.weights, self.biases))
        a, cores, b = (list(map(function, field)) for field in (self.a, self.cores, self.b))
        return Members(weights, a, cores, b, biases, self.scales)


class Mask(NamedTuple):
    """Dropout on the adapters' x: a function of a member's seed and an element's position; nothing is stored.

    `dropout` is a multiple of 2^-16.
    """

    dropout: float = 0.0
    seeds: tuple[int, ...] = (0,)

    @property
    def threshold(self) -> int:
        """Least value of a kept element's 16 random bits, in the upper half of 32; unsigned, stored as an int32."""
        bits = round(self.dropout * 2**16) << 16
        return bits - 2**32 if bits >= 2**31 else bits

    @property
    def arguments(self) -> Arguments:
        """Return the arguments of a kernel that masks x."""
        return dict(seeds=self.seeds, threshold=self.threshold, DROPOUT=self.dropout > 0.0)

    def select(self, indices: slice) -> Mask:
        """Return the mask of some of the members."""
        return Mask(self.dropout, self.seeds[indices]) if self.dropout > 0.0 else self


NO_DROPOUT = Mask()


def unit_rows(matrix: Tensor) -> Tensor:
    """Return a matrix with a contiguous last dimension, which every kernel requires; copied only if necessary."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def whole(cores: Tensor) -> Tensor:
    """Return cores [K, r, r] with contiguous R's, with gaps between them as in a bank; copied only if necessary."""
    return cores if cores.stride()[1:] == (cores.shape[2], 1) else cores.contiguous()


def kernel_biases(biases: Sequence[Tensor | None], ys: Sequence[Tensor]) -> tuple[bool, tuple[Tensor, ...]]:
    """Return HAS_BIAS, one flag for all outputs, and a bias per output: zeros if it has none; dummies if none has."""
    if all(bias is None for bias in biases):
        return False, tuple(ys)
    pairs = zip(biases, ys, strict=True)
    return True, tuple(y.new_zeros(y.shape[1]) if bias is None else bias.contiguous() for bias, y in pairs)


def allocate_workspace(like: Tensor, size: int, slots: int, programs: int) -> tuple[Tensor, Tensor]:
    """Return fp32 partial sums [size] and counters [slots] for `programs` that share a result; dummies for one."""
    if programs == 1:
        dummy = like.new_empty(1, dtype=torch.float32)
        return dummy, dummy.view(torch.int32)
    return like.new_empty(size, dtype=torch.float32), counters(like.device, slots)


def needs_int64(*tensors: Tensor, elements: int = 0) -> bool:
    """True if an offset into one of the tensors, or below `elements`, does not fit 32 bits."""
    return any(t.stride(0) * t.shape[0] >= INT32_LIMIT for t in tensors) or elements >= INT32_LIMIT


def precision(dtype: torch.dtype) -> str:
    """tl.dot's precision for operands of x's dtype; full fp32 unless TF32 is enabled in torch."""
    return "tf32" if dtype == torch.float32 and fp32_precision() == "tf32" else "ieee"


def fp32_precision() -> str:
    """Return torch's setting for products in fp32: "tf32", "ieee" or "none"."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def core_precision(dtype: torch.dtype) -> str:
    """tl.dot's precision for the product with R: TF32 for a 16-bit x, with R in two parts, which loses nothing."""
    return precision(dtype) if dtype == torch.float32 else "tf32"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# Counters of arriving programs, for each device's default stream: zero whenever no kernel runs, because the last
# program to arrive resets its own.
_kept: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return at least `count` zeros, int32, that no other stream uses at the same time.

    The default stream's are reused. Another stream gets new ones in each call, and so does a capture: a replay must not
    share counters with other work that runs at the same time.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            if device not in _kept or _kept[device].numel() < count:
                _kept[device] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
            return _kept[device]
    return torch.zeros(count, dtype=torch.int32, device=device)


def forget_counters() -> None:
    """Drop every counter: after a failed launch, one may be above zero."""
    _kept.clear()
