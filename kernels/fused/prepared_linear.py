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
    """One kind of forward: its plan, the shapes of what it allocates, and its launches."""

    is_checked = False  # True once its first results were right

    def __init__(self, x: Tensor, members: Members, plan: LaunchPlan, mask: Mask) -> None:
        rows, self.count = _rows(x), len(members.a)
        self.plan, self.is_fused = plan, linear.is_fused(plan, members)
        self.v_shape = len(rows), members.width * self.count
        self.shapes: list[tuple[int, ...]] = [(len(rows), members.r)] * self.count
        # y_i, or v, from which cuBLAS computes them
        self.shapes += [(*x.shape[:-1], b.shape[0]) for b in members.b] if self.is_fused else [self.v_shape]
        self.prepared: Prepared | None = None
        with on_device(x), suppress(NotPreparedError):
            self.prepared = self._prepare(_on_meta(rows), members.map(_on_meta), mask)
            self.shapes += self.prepared.scratch

    def __call__(self, x: Tensor, members: Members, mask: Mask) -> Ys | None:
        if self.prepared is None:
            return None
        found, count = prepared_launch.allocate(x, self.shapes), self.count
        if not self.prepared.repeat(self._tensors(x, members, found), mask.seeds):
            return None
        if self.is_fused:
            return found[count : 2 * count], found[:count]
        return linear.unfused(_rows(x), members, found[count], self.plan), found[:count]

    def _tensors(self, x: Tensor, members: Members, found: list[Tensor]) -> list[Tensor]:
        """Return the launches' buffers, with the allocated ones; the tensors of one argument are adjacent."""
        tensors = [x, *members.a, *members.cores, *found[: self.count]]
        if self.is_fused:
            tensors += members.b
            tensors += [t for t in (*members.weights, *members.biases) if t is not None]
        return tensors + found[self.count :]

    def _prepare(self, x: Tensor, members: Members, mask: Mask) -> Prepared:
        found = prepared_launch.allocate(x, self.shapes)
        us, others, tensors = found[: self.count], found[self.count :], self._tensors(x, members, found)
        v = x.new_empty(self.v_shape) if self.is_fused else others[0]
        calls = linear.prep_calls(x, members, us, v, self.plan, mask)
        if not self.is_fused:
            return Prepared(calls, tensors)
        calls.append(extended_gemm.forward_call(x, members, v, [_rows(y) for y in others], self.plan))
        return Prepared(calls, tensors, inner=[v])


class Backward:
    """One kind of backward: its plan, the shapes of what it allocates, and its launches.

    Attributes:
        before: all launches, or those before TMA or cuBLAS writes dx: the thin products, and dR.
        after: a launch after dx, or None. It computes dR if nothing may come between the thin products and the TMA
            launch that overlaps them; with dropout, it also adds the adapter's masked term to what cuBLAS wrote.
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
        rows = [_rows(dy) for dy in dys]
        self.plan, self.need_dx, self.need_dcore = plan, need_dx, need_dcore
        self.is_fused = need_dx and linear.is_fused(plan, members, mask)
        self.has_addmm = need_dx and not self.is_fused  # cuBLAS computes dx, and reads w unless that is masked
        self.adds_masked = self.has_addmm and mask.dropout > 0.0
        self.ends_apart = self.adds_masked or (self.has_addmm and need_dcore and plan.path == "tma")
        self.thin = self.has_addmm + self.ends_apart  # w, or w and t, which outlive the first launches
        self.t_shape = (len(rows[0]), members.width * len(dys))
        leading = rows[0].shape[:1] if self.has_addmm else dys[0].shape[:-1]  # cuBLAS writes a matrix
        dx_shape: tuple[int, ...] = (*leading, members.a[0].shape[1])
        self.shapes = [dx_shape] * need_dx + [self.t_shape] * self.thin
        self.core_shapes = [core.shape for core in members.cores]
        meta = [_on_meta(dy) for dy in rows], members.map(_on_meta), [_on_meta(u) for u in us]
        self.before: Prepared | None = None
        self.after: Prepared | None = None
        with on_device(dys[0]), suppress(NotPreparedError):
            self.before, self.after = self._prepare(*meta, mask)
            self.shapes += self.before.scratch

    def __call__(self, dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], mask: Mask) -> Gradients | None:
        if self.before is None:
            return None
        dx, dcores, others = self._allocate(dys, members)
        tensors = self._tensors(dys, members, us, dx, dcores)
        if not self.before.repeat(tensors + others, mask.seeds):
            return None
        if dx is not None and self.has_addmm:
            w = None if self.adds_masked else others[0]
            linear.unfused_backward([_rows(dy) for dy in dys], members, w, dx, self.plan)
        if self.after is not None:  # with the same tensors, whose alignment is checked
            scratch = prepared_launch.allocate(dys[0], self.after.scratch)
            self.after.repeat([*tensors, *others[: self.thin], *scratch], mask.seeds)
        return dx, dcores

    def _allocate(self, dys: Sequence[Tensor], members: Members) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """dx and the dR_i, where they are needed; w and t, where they outlive the first launches, and the scratch."""
        dcores = prepared_launch.allocate(members.cores[0], self.core_shapes) if self.need_dcore else []
        others = prepared_launch.allocate(dys[0], self.shapes)
        return others.pop(0) if self.need_dx else None, dcores, others

    def _tensors(
        self, dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], dx: Tensor | None, dcores: list[Tensor]
    ) -> list[Tensor]:
        """Return the launches' buffers except t and w; the tensors of one argument are adjacent."""
        tensors = [*dys, *members.b, *members.cores]
        if self.is_fused or self.adds_masked or dcores:
            tensors += members.a
        if dcores:
            tensors += us
            tensors += dcores
        if self.is_fused:
            tensors += [weight for weight in members.weights if weight is not None]
        if dx is not None and (self.is_fused or self.adds_masked):
            tensors.append(dx)
        return tensors

    def _prepare(
        self, dys: list[Tensor], members: Members, us: list[Tensor], mask: Mask
    ) -> tuple[Prepared, Prepared | None]:
        dx, dcores, thin = self._allocate(dys, members)
        tensors = self._tensors(dys, members, us, dx, dcores)
        # w, then t; tensors that do not outlive the first launches are inner ones
        inner = [dys[0].new_empty(self.t_shape) for _ in range(1 + self.need_dx - self.thin)]
        *ws, t = thin + inner
        w = ws[0] if ws else t
        calls = [low_rank.backward_call(dys, members, t, w, self.plan, self.need_dx)]
        if self.is_fused or self.adds_masked or dcores:
            written = _rows(dx) if dx is not None and (self.is_fused or self.adds_masked) else None
            given = dys, members, us, t, w, written, dcores, self.plan, mask
            calls.append(extended_gemm.backward_call(*given, add=self.adds_masked))
        if self.ends_apart:
            return Prepared(calls[:1], tensors + thin), Prepared(calls[1:], tensors + thin)
        return Prepared(calls, tensors + thin, inner), None


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
