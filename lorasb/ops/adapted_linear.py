"""The adapted linear as one torch op, for one layer or several that read the same x, for any storage of W:
x [..., n] -> y_j = x W_jᵀ + s_j·x A_jᵀ R_jᵀ B_jᵀ + bias_j [..., m_j], then u_j = x A_jᵀ [M, r] of the M tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..compat import torch as private
from . import registry
from .calls import DENSE, Operands

# `serve_dense` computes one dense layer where no gradient is recorded and returns only y: passing lists through the
# dispatcher costs 20 µs. A compiled layer of 576 features takes 121 µs per token by the op with lists, 89 µs by this
# one (bf16, AMX, two cores).
OP, BACKWARD_OP, SERVE_OP = "adapted_linear", "adapted_linear_backward", "serve_dense"
NO_SECOND_DERIVATIVE = (
    "LoRA-SB's linear has no second derivative here: call backward or autograd.grad once, or use torch.func.hessian"
)
_OPERANDS = (
    "Tensor[] base, int[] layout, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, float[] scalings, "
    "Tensor? row_index, float dropout, Tensor? seeds"
)
_SERVE = "(Tensor x, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor? bias, float scaling) -> Tensor"
_FORWARD = f"(Tensor x, {_OPERANDS}) -> Tensor[]"
_BACKWARD = f"(Tensor[] dys, Tensor[] us, {_OPERANDS}, bool need_dx, bool need_dcores) -> Tensor[]"


def adapted_linear(x: Tensor, operands: Operands, backend: str, kernels: registry.Kernels | None) -> list[Tensor]:
    """Return the y_j [..., m_j] of x [..., n], by `kernels` if given (for plain operands), else by the backend's op."""
    count = len(operands.a)
    if kernels is None:
        is_dense = not (operands.is_quantized or operands.row_index is not None or operands.dropout)
        # torch.jit.trace checks its graph in the other grad mode, where it expects the same ops
        if count == 1 and is_dense and not torch.is_grad_enabled() and private.tracing_state() is None:
            _, _, (a,), (core,), (b,), biases, (scaling,), *_ = operands
            weight, bias = operands.base[0] if operands.base else None, biases[0] if biases else None
            return [registry.backend_op(SERVE_OP, backend)(x, weight, a, core, b, bias, scaling)]
        outputs = registry.backend_op(OP, backend)(x, *operands)
    elif torch.is_grad_enabled():
        # An autograd function sees only tensors that are arguments themselves.
        tensors = *operands.base, *operands.a, *operands.cores, *operands.b, *operands.biases
        # Skip `Function.apply`, which prepares for functorch: no transform is active if kernels are given.
        outputs = super(torch.autograd.Function, _Function).apply(x, operands, kernels, *tensors)
    else:
        outputs = kernels.forward(x, operands)
    return list(outputs[:count])


def _save(ctx: Any, x: Tensor, operands: Operands, us: Sequence[Tensor]) -> None:
    """Save the u_j [M, r] and tensors that the layers hold anyway, but never x [M, n] or a dequantized W."""
    base, layout, a, cores, b, biases, scalings, row_index, dropout, seeds = operands
    ctx.set_materialize_grads(False)  # a dy_j that the loss does not use is None
    # Not ctx.needs_input_grad, which has one entry for each list.
    need_dcores = [core.requires_grad for core in cores]
    if True not in need_dcores:  # empty ones free the memory, and keep the number of saved tensors fixed
        us = [u.new_empty((0, u.shape[1])) for u in us]
    ctx.save_for_backward(*base, *a, *cores, *b, *us, row_index, seeds)
    # Numbers of base tensors and of biases, layout, scalings, dropout, and whether dx and each dR_j are needed. One
    # attribute: setting one takes as long as allocating a small tensor.
    ctx.rest = len(base), len(biases), layout, scalings, dropout, x.requires_grad, need_dcores


def _gradients(
    backward: registry.Backward, saved: tuple[Tensor, ...], rest: Any, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dx and the dR_j, None if not needed. The first `dys` belong to the y_j; None: the loss does not use it."""
    a, _, layout, scalings, dropout, need_dx, need_dcores = rest
    count, any_dcores = len(need_dcores), True in need_dcores
    given = [dy for dy in dys[:count] if dy is not None]
    if not given or not (need_dx or any_dcores):
        return None, [None] * count
    cores, b, first = a + count, a + 2 * count, a + 3 * count
    operands = Operands(
        saved[:a], layout, saved[a:cores], saved[cores:b], saved[b:first], (), scalings, saved[-2], dropout, saved[-1]
    )
    us = list(saved[first : first + count])
    if len(given) < count:
        used = [j for j in range(count) if dys[j] is not None]
        operands, us = operands.select(used), [us[j] for j in used]
    dx, *found = backward(given, us, operands, need_dx, any_dcores)
    dcores: list[Tensor | None] = [*found]
    if len(given) < count:
        by_member = dict(zip(used, found, strict=True))
        dcores = [by_member.get(j) for j in range(count)]
    if False in need_dcores:
        dcores = [dcore if needed else None for dcore, needed in zip(dcores, need_dcores, strict=True)]
    return dx if need_dx else None, dcores


class _Function(torch.autograd.Function):
    """The op for plain tensors: x, operands, kernels and the operands' tensors -> the y_j, then the u_j."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: Operands, kernels: registry.Kernels, *_: Tensor) -> tuple[Tensor, ...]:
        outputs = kernels.forward(x, operands)
        ctx.kernels = kernels
        _save(ctx, x, operands, outputs[len(operands.a) :])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[object, ...]:
        rest = ctx.rest
        base, biases, count = rest[0], rest[1], len(rest[-1])
        backward = ctx.kernels.backward
        if torch.is_grad_enabled():
            # `create_graph=True`: the op records a node that raises if a second derivative passes through dy, R or u;
            # u is an output here, so that paths from x lead to the node as well.
            backward = ctx.kernels.backward_op
        elif not all(dy is None or private.has_storage(dy) for dy in grads):  # batched gradients
            backward = registry.direct_kernels["eager", "cpu"].backward
        dx, dcores = _gradients(backward, ctx.saved_tensors, rest, grads)
        return dx, None, None, *[None] * (base + count), *dcores, *[None] * (count + biases)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands = Operands._make(inputs[1:])
    us = output[len(operands.a) :]
    ctx.mark_non_differentiable(*us)
    _save(ctx, inputs[0], operands, us)


def _derivative(owner: str) -> Callable[..., tuple[object, ...]]:
    """Return the formula of an owner's op; it also serves the op that returns only y."""
    op = registry.backward_op(owner)

    def backward(ctx: Any, grads: Tensor | Sequence[Tensor | None]) -> tuple[object, ...]:
        if torch.is_grad_enabled():  # x is not saved, and no graph could lead from dR to it
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        base, biases, *_, need_dcores = ctx.rest
        count = len(need_dcores)
        if isinstance(grads, Tensor):
            dx, dcores = _gradients(op, ctx.saved_tensors, ctx.rest, [grads])
            return dx, None, None, dcores[0], None, None, None
        dx, dcores = _gradients(op, ctx.saved_tensors, ctx.rest, grads)
        none = [None] * count
        return dx, [None] * base, None, none, dcores, none, [None] * biases, *(None,) * 4

    return backward


def _serve_fake(x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def _serve_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save for backward if a graph captured without gradients runs with them; u is recomputed."""
    x, weight, a, core, b, _, scaling = inputs
    base, u = [] if weight is None else [weight], x.reshape(-1, x.shape[-1]) @ a.t()
    _save(ctx, x, Operands(base, DENSE, [a], [core], [b], [], [scaling]), [u])


def _forward_fake(x: Tensor, *given: object) -> list[Tensor]:
    operands = Operands._make(given)
    ys = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in operands.b]
    return ys + [x.new_empty((math.prod(x.shape[:-1]), a.shape[0])) for a in operands.a]


def _backward_fake(dys: list[Tensor], us: list[Tensor], *given: object) -> list[Tensor]:
    *flat, need_dx, need_dcores = given
    operands = Operands._make(flat)
    dx = dys[0].new_empty((*dys[0].shape[:-1], operands.a[0].shape[1]) if need_dx else (0,))
    return [dx, *(core.new_empty(core.shape if need_dcores else (0,)) for core in operands.cores)]


def _raise_second_derivative(ctx: object, *_: object) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def register_backend(
    owners: Sequence[str],
    keys: Sequence[str],
    forward: registry.Forward,
    backward: registry.Backward,
    others: Mapping[str, registry.Function],  # kernels of other ops
) -> None:
    """Register kernels for dispatch keys, under the ops of the `owners`: a backend, `auto`, or both."""

    def op(x: Tensor, *given: object) -> list[Tensor]:
        return list(forward(x, Operands._make(given)))

    def backward_op(dys: list[Tensor], us: list[Tensor], *given: object) -> list[Tensor]:
        need = cast("tuple[bool, bool]", given[-2:])  # dx, dR
        return list(backward(dys, us, Operands._make(given[:-2]), *need))

    def y_alone(
        x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        """Return y [..., m] for `serve_dense`."""
        base, biases = [] if weight is None else [weight], [] if bias is None else [bias]
        return forward(x, Operands(base, DENSE, [a], [core], [b], biases, [scaling]))[0]

    kernels: dict[str, registry.Function] = {OP: op, BACKWARD_OP: backward_op, SERVE_OP: y_alone, **others}
    for owner in owners:
        for name, kernel in kernels.items():
            for key in keys:
                registry.library.impl(registry.op_name(name, owner), kernel, key)
        registry.record(owner, keys, forward, backward)


# The backward op first, as the others' formulas call it. Its own formula raises a clear error on double backward.
registry.define(BACKWARD_OP, _BACKWARD, _backward_fake, lambda _: _raise_second_derivative)
registry.define(OP, _FORWARD, _forward_fake, _derivative, _setup)
registry.define(SERVE_OP, _SERVE, _serve_fake, _derivative, _serve_setup)
