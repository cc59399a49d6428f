"""`linear`'s forward and backward from launches prepared once for a kind of call: shapes, strides, dtypes and scales.

Calls go through `linear` as usual if kernels are interpreted or observed, another device is current, pointers are not
aligned to 16 bytes, or a kernel would need copies of operands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from ..compat import triton as private
from . import extended_gemm, launcher, linear, low_rank, prepared_launch
from . import plan as plan_tables
from .operands import INT32_LIMIT, Mask, Members, fp32_precision, on_device
from .plan import LaunchPlan
from .prepared_launch import NotPreparedError, Prepared

MOST_KINDS = 4096  # a few KB each; every number of tokens is a kind
Ys = tuple[list[Tensor], list[Tensor]]  # y_i and u_i
Gradients = tuple[Tensor | None, list[Tensor]]  # dx and dR_i
# Called for a new kind of call: returns its plan; checks its first results, and raises if they are wrong.
First = tuple[Callable[..., LaunchPlan], Callable[..., None]]
_forwards: dict[Hashable, Forward] = {}
_backwards: dict[Hashable, Backward] = {}
Kind = TypeVar("Kind")  # Forward or Backward


def forward(x: Tensor, members: Members, mask: Mask, first: First, signature: Hashable) -> Ys | None:
    """y_i [..., m_i], or [M, m_i] where cuBLAS writes them, and u_i [M, r]; None if `linear.forward` has to be called.

    x is [..., n]; `signature` is equal for calls whose tensors differ only in their values, and None if that is not
    known.
    """
    if signature is None or not _is_ready(x):
        return None
    key = (signature, *_key(x, members, mask))
    kind = _forwards.get(key)
    if kind is None:
        if not _has_rows(x):
            return None
        kind = Forward(x, members, first[0](x, members, mask), mask)
        _keep(_forwards, key, kind, x)
    found = kind(x, members, mask)
    if found is not None and not kind.is_checked:
        first[1](x, members, mask, found)
        kind.is_checked = True
    return found


def backward(
    dys: Sequence[Tensor],
    members: Members,
    us: list[Tensor],
    mask: Mask,
    need: tuple[bool, bool],
    first: First,
    signature: Hashable,
) -> Gradients | None:
    """dx [..., n], or [M, n] where cuBLAS writes it, and dR_i [r, r]; None if `linear.backward` has to be called."""
    if signature is None or not _is_ready(dys[0]):
        return None
    key = (signature, need, *_key(dys[0], members, mask))
    kind = _backwards.get(key)
    if kind is None:
        if not all(map(_has_rows, dys)):
            return None
        kind = Backward(dys, members, us, first[0](dys, members, us, mask), *need, mask)
        _keep(_backwards, key, kind, dys[0])
    found = kind(dys, members, us, mask)
    if found is not None and not kind.is_checked:
        first[1](dys, members, us, mask, found)
        kind.is_checked = True
    return found


def _keep(kinds: dict[Hashable, Kind], key: Hashable, kind: Kind, like: Tensor) -> None:
    """Keep a kind for later calls, unless its first call is in a graph capture: its plan has not been checked."""
    if prepared_launch.is_captured(like):
        return
    if len(_forwards) + len(_backwards) >= MOST_KINDS:
        forget()
    kinds[key] = kind


class Forward:
    """One kind of forward: the shapes of what it allocates, and its launches."""

    is_checked = False  # True once its first results were right

    def __init__(self, x: Tensor, members: Members, plan: LaunchPlan, mask: Mask) -> None:
        rows, meta, self.count = _on_meta(_rows(x)), members.map(_on_meta), len(members.a)
        M, widths = len(rows), [len(b) for b in members.b]
        us, ys = [rows.new_empty((M, members.r)) for _ in members.a], [rows.new_empty((M, width)) for width in widths]
        v = rows.new_empty((M, members.width * self.count))
        self.prepared: Prepared | None = None
        with on_device(x), suppress(NotPreparedError):
            last = linear.output_call(rows, meta, v, ys, plan)
            self.is_addmm = last is None  # cuBLAS computes y_i from v
            tensors = self._tensors(rows, meta, [*us, *([v] if self.is_addmm else ys)])
            calls = linear.prep_calls(rows, meta, us, v, plan, mask)
            self.prepared = Prepared(calls, tensors) if last is None else Prepared([*calls, last], tensors, inner=[v])
            self.shapes: list[tuple[int, ...]] = [(M, members.r)] * self.count
            self.shapes += [tuple(v.shape)] if self.is_addmm else [(*x.shape[:-1], width) for width in widths]
            self.shapes += self.prepared.scratch

    def __call__(self, x: Tensor, members: Members, mask: Mask) -> Ys | None:
        if self.prepared is None:
            return None
        found, count = prepared_launch.allocate(x, self.shapes), self.count
        if not self.prepared.repeat(self._tensors(x, members, found), mask.seeds):
            return None
        if self.is_addmm:
            return linear.by_addmm(_rows(x), members, found[count]), found[:count]
        return found[count : 2 * count], found[:count]

    def _tensors(self, x: Tensor, members: Members, found: list[Tensor]) -> list[Tensor]:
        """Return the launches' buffers, with the allocated ones; the tensors of one argument are adjacent."""
        tensors = [x, *members.a, *members.cores, *found[: self.count]]
        if not self.is_addmm:
            tensors += members.b
            tensors += [t for t in (*members.weights, *members.biases) if t is not None]
        return tensors + found[self.count :]


class Backward:
    """One kind of backward: the shapes of what it allocates, and its launches.

    Attributes:
        before: all launches, or those before cuBLAS writes dx: the thin products, and without dropout dR.
        after: with dropout, the launch that adds the adapters' masked terms to what cuBLAS wrote, and dR; or None.
    """

    is_checked = False  # True once its first results were right

    def __init__(
        self,
        dys: Sequence[Tensor],
        members: Members,
        us: Sequence[Tensor],
        plan: LaunchPlan,
        need_dx: bool,
        need_dcore: bool,
        mask: Mask,
    ) -> None:
        rows, us, meta = [_on_meta(_rows(dy)) for dy in dys], list(map(_on_meta, us)), members.map(_on_meta)
        self.need_dx, masked = need_dx, mask.dropout > 0.0
        t = rows[0].new_empty((len(rows[0]), members.width * len(dys)))
        w, dx = torch.empty_like(t) if need_dx else t, linear.empty_dx(rows, meta) if need_dx else None
        self.core_shapes = [core.shape for core in members.cores] if need_dcore else []
        dcores = [core.new_empty(core.shape) for core in meta.cores] if need_dcore else []
        self.before: Prepared | None = None
        self.after: Prepared | None = None
        with on_device(dys[0]), suppress(NotPreparedError):
            fused, by_tma = need_dx and linear.is_fused(plan, members, mask), None
            if dx is not None and not fused:
                by_tma = linear.tma_backward_call(rows, meta, None if masked else w, dx, plan)
            self.is_addmm = need_dx and not fused and by_tma is None  # cuBLAS computes dx, reading w unless masked
            self.adds_masked = need_dx and not fused and masked
            calls = [low_rank.backward_call(rows, meta, t, w, plan, need_dx), *([] if by_tma is None else [by_tma])]
            if fused or self.adds_masked or dcores:
                written = dx if fused or self.adds_masked else None
                given = rows, meta, us, t, w, written, dcores, plan, mask
                calls.append(extended_gemm.backward_call(*given, add=self.adds_masked))
            # w, and t if a launch follows cuBLAS, outlive the first launches
            outer = [w, t][: self.is_addmm * (1 + masked)]
            inner = [w, t][len(outer) :] if need_dx else [t]
            tensors, first = self._tensors(rows, meta, us, dx, dcores) + outer, 1 if len(outer) > 1 else len(calls)
            before = Prepared(calls[:first], tensors, inner)
            self.after = Prepared(calls[first:], tensors) if calls[first:] else None
            # cuBLAS writes a matrix
            leading, self.thin = rows[0].shape[:1] if self.is_addmm else dys[0].shape[:-1], len(outer)
            self.shapes = [(*leading, members.a[0].shape[1])] * need_dx + [tuple(t.shape)] * self.thin
            self.shapes += before.scratch
            self.before = before  # last: only if all launches were prepared

    def __call__(self, dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], mask: Mask) -> Gradients | None:
        if self.before is None:
            return None
        dx, dcores, others = self._allocate(dys, members)
        tensors = self._tensors(dys, members, us, dx, dcores)
        if not self.before.repeat(tensors + others, mask.seeds):
            return None
        if dx is not None and self.is_addmm:
            linear.addmm_backward([_rows(dy) for dy in dys], members, None if self.adds_masked else others[0], dx)
        if self.after is not None:  # with the same tensors, whose alignment is checked
            scratch = prepared_launch.allocate(dys[0], self.after.scratch)
            self.after.repeat([*tensors, *others[: self.thin], *scratch], mask.seeds)
        return dx, dcores

    def _allocate(self, dys: Sequence[Tensor], members: Members) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """dx and the dR_i, where they are needed; w and t, where they outlive the first launches, and the scratch."""
        dcores = prepared_launch.allocate(members.cores[0], self.core_shapes) if self.core_shapes else []
        others = prepared_launch.allocate(dys[0], self.shapes)
        return others.pop(0) if self.need_dx else None, dcores, others

    def _tensors(
        self, dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], dx: Tensor | None, dcores: list[Tensor]
    ) -> list[Tensor]:
        """Return the launches' buffers except t and w; the tensors of one argument are adjacent."""
        tensors, writes_dx = [*dys, *members.b, *members.cores], self.need_dx and not self.is_addmm
        if writes_dx or self.adds_masked or dcores:
            tensors += members.a
        if dcores:
            tensors += us
            tensors += dcores
        if writes_dx:
            tensors += [weight for weight in members.weights if weight is not None]
        if dx is not None and (writes_dx or self.adds_masked):
            tensors.append(dx)
        return tensors


def forget() -> None:
    """Prepare every kind again at its next call."""
    _forwards.clear()
    _backwards.clear()


def _is_ready(x: Tensor) -> bool:
    """True if a launch on x's device can be repeated now."""
    if launcher.observers or not private.may_repeat(extended_gemm.extended_gemm):
        return False
    return not x.is_cuda or x.get_device() == torch.cuda.current_device()


def _has_rows(x: Tensor) -> bool:
    """True for a nonempty x [..., n] that is contiguous, or a matrix with contiguous rows."""
    return x.numel() > 0 and (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1))


def _rows(x: Tensor) -> Tensor:
    """x as [M, n], a view."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _key(x: Tensor, members: Members, mask: Mask) -> tuple[Hashable, ...]:
    """Key of a call's launches, in addition to its signature."""
    # Triton compiles another kernel for 64-bit seeds
    wide_seeds = tuple([not -INT32_LIMIT <= seed < INT32_LIMIT for seed in mask.seeds]) if mask.dropout else ()
    product = fp32_precision() if x.dtype == torch.float32 else ""
    return plan_tables.generation, product, mask.dropout, wide_seeds, *members.scales


def _on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same kind without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
