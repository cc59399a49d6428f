"""Direct calls of the kernels that the dispatcher would choose, for plain tensors on the CPU or a GPU.

Two passes through the dispatcher and back into Python take as long as a small layer's adapter. The autograd functions
here call the same kernels as the ops' formulas, so both ways compute the same; tracing, functorch transforms, tensor
subclasses and dispatch modes always get the op itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..compat import torch as private
from . import registry
from .linear_group import gradients
from .registry import Kernels
from .signatures import PLAIN, is_intercepted

# Bytes of x below which torch's own ops are faster than our autograd function. Measured with 4096 features and 512
# tokens: bf16 (4 MiB) is below the crossover, fp32 (8 MiB) above.
SMALL_BYTES = 6 * 2**20


def kernels(op: str, backend: str, x: Tensor, *others: Tensor | None) -> Kernels | None:
    """The op's forward and backward kernels for x's device; None if something has to intercept the op itself."""
    if torch.compiler.is_compiling() or is_intercepted() or private.is_wrapped(x):
        return None
    on_cpu = x.is_cpu
    for tensor in (x, *others):  # by exact type: subclasses (DTensor, FakeTensor) intercept ops in __torch_dispatch__
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_cpu != on_cpu):
            return None
    return plain_kernels(op, backend, x)


def plain_kernels(op: str, backend: str, x: Tensor) -> Kernels | None:
    """Return the direct kernels for operands that `signatures.of` has found plain, on devices that were compared."""
    if not (x.is_cpu or x.is_cuda):
        return None
    return registry.direct_kernels(op, backend, "CPU" if x.is_cpu else "CUDA")


def small(x: Tensor, frozen: Iterable[Tensor | None]) -> bool:
    """True if a call is faster composed of torch's own ops than by our autograd function.

    That is so without gradients, and for a small x, where the Python overhead of our backward takes longer than the
    pass over dx that it saves. False wherever torch's autograd would compute something else than the op's.
    """
    if x.dtype == torch.float16:  # dR sums over all tokens in x's dtype, which overflows in fp16
        return False
    if torch.is_autocast_enabled("cpu"):  # autocast would cast the product with R, too
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in frozen):  # the op gives W, A, B, bias no gradients
        return False
    return not torch.is_grad_enabled() or x.numel() * x.element_size() < SMALL_BYTES


def composed(
    x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = x Wᵀ + bias, then s·x Aᵀ Rᵀ Bᵀ accumulated onto it.

    autograd saves u = x Aᵀ [M, r] for dR but not x, which only gradients of W and A would need.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scaled = core if scaling == 1.0 else core * scaling
    v = functional.linear(functional.linear(rows, a), scaled.to(x.dtype))
    # In place: linear saves its inputs and not its result, so overwriting that does not invalidate the graph.
    y = functional.linear(v, b, bias) if weight is None else functional.linear(rows, weight, bias).addmm_(v, b.t())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[0])


def transformed(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    index: Tensor | None = None,
) -> Tensor:
    """Compute y by out-of-place torch operations, which have every derivative, forward mode and `vmap`.

    The product with R is computed in R's dtype, so that dR does not overflow in fp16.
    With `index` [n], `core` is [K, r, r] and row x[i] is computed with core[index[i]], or the base alone for -1.
    """
    with torch.autocast(x.device.type, enabled=False):
        a, b = a.detach(), b.detach()  # frozen, as for the ops
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        u = functional.linear(functional.dropout(x, dropout), a).to(core.dtype)
        if index is None:
            v = functional.linear(u, core * scaling)
        else:
            chosen = core.index_select(0, index.clamp(min=0).to(core.device)) * scaling
            chosen = chosen * (index >= 0).to(core)[:, None, None]
            v = (u.reshape(len(index), -1, u.shape[-1]) @ chosen.mT).reshape(u.shape)
        y = functional.linear(v.to(x.dtype), b, bias)
        return y if weight is None else y + functional.linear(x, weight)


def _backward_of(kernels: Kernels) -> Callable[..., Any]:
    """Return the backward kernel, or the op itself where something else than a number comes of it.

    That is a functorch transform (`is_grads_batched=True`), and `create_graph=True`: the op records a node that raises
    on the paths from dy, R and u, which is an output of the functions here so that one from x leads to it.
    """
    if torch.is_grad_enabled() or private.transforms_active():
        return kernels.backward_op
    return kernels.backward


class Linear(torch.autograd.Function):
    """Arguments: the op's tensors, then (scaling, dropout, seed, kernels). Returns y and u."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, (scaling, dropout, seed, ctx.kernels) = arguments
        y: Tensor
        y, u = ctx.kernels.forward(*tensors, scaling, dropout, seed)
        _, weight, a, core, b, _ = tensors
        ctx.need_dx, _, _, ctx.need_dcore, *_ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)  # dy may be None
        # u [M, r] for dR, and never x [M, n]; an empty u in place of one that is not needed frees its memory
        ctx.save_for_backward(weight, a, core, b, u if ctx.need_dcore else u.new_empty((0, a.shape[0])), seed)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None or not (ctx.need_dx or ctx.need_dcore):  # if a gradient is needed of frozen tensors alone
            return (None,) * 7
        weight, a, core, b, u, seed = ctx.saved_tensors
        flags = ctx.scaling, ctx.dropout, seed, ctx.need_dx, ctx.need_dcore
        dx, dcore = _backward_of(ctx.kernels)(dy, weight, a, core, b, u, *flags)
        return dx if ctx.need_dx else None, None, None, dcore if ctx.need_dcore else None, None, None, None


class LinearQuantized(torch.autograd.Function):
    """Arguments: x, A, R, B, bias, (quant, layout, scaling, dropout, seed, kernels), and the tensors of `quant`.

    Returns y and u. An autograd function sees only tensors that are arguments themselves, not those inside of lists.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, a, core, b, bias, (quant, layout, scaling, dropout, seed, ctx.kernels) = arguments[:6]
        y: Tensor
        y, u = ctx.kernels.forward(x, quant, layout, a, core, b, bias, scaling, dropout, seed)
        ctx.need_dx, _, ctx.need_dcore, *_ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, core, b, u if ctx.need_dcore else u.new_empty((0, a.shape[0])), seed, *quant)
        ctx.layout, ctx.scaling, ctx.dropout = list(layout), scaling, dropout
        return y, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        a, core, b, u, seed, *quant = ctx.saved_tensors
        no_grads = (None,) * (3 + len(quant))
        if dy is None or not (ctx.need_dx or ctx.need_dcore):
            return None, None, None, *no_grads
        flags = ctx.scaling, ctx.dropout, seed, ctx.need_dx, ctx.need_dcore
        dx, dcore = _backward_of(ctx.kernels)(dy, quant, ctx.layout, a, core, b, u, *flags)
        return dx if ctx.need_dx else None, None, dcore if ctx.need_dcore else None, *no_grads


class LinearGroup(torch.autograd.Function):
    """Arguments: x, (scalings, dropout, seeds, kernels), then weights, A, R, B and biases (which may be none).

    Returns the y_i, then the u_i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.scalings, ctx.dropout, seeds, ctx.kernels = options
        count = len(ctx.scalings)
        weights, a, cores, b, biases = (list(tensors[i : i + count]) for i in range(0, 5 * count, count))
        output = ctx.kernels.forward(x, weights, a, cores, b, biases, ctx.scalings, ctx.dropout, seeds)
        ys, us = output[:count], output[count:]
        ctx.need_dx, ctx.need_dcores = ctx.needs_input_grad[0], ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count]
        saved = us if any(ctx.need_dcores) else [u.new_empty((0, u.shape[1])) for u in us]
        ctx.save_for_backward(*weights, *a, *cores, *b, *saved, seeds)
        ctx.biases = len(biases)
        ctx.set_materialize_grads(False)  # None for a y that the loss does not use
        return (*ys, *us)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, dcores = gradients(_backward_of(ctx.kernels), ctx, grads)
        no_grads = [None] * len(dcores)
        return (dx, None, *no_grads, *no_grads, *dcores, *no_grads, *[None] * ctx.biases)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Past `Function.apply`, which prepares for functorch: `kernels` has seen that no transform is active."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def linear(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    kernels: Kernels,
) -> Tensor:
    """y of `lorasb::linear`."""
    y: Tensor
    if torch.is_grad_enabled():
        y, _ = _apply(Linear, x, weight, a, core, b, bias, (scaling, dropout, seed, kernels))
    else:
        y, _ = kernels.forward(x, weight, a, core, b, bias, scaling, dropout, seed)
    return y


def linear_quantized(
    x: Tensor,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    kernels: Kernels,
) -> Tensor:
    """y of `lorasb::linear_quantized`."""
    y: Tensor
    if torch.is_grad_enabled():
        y, _ = _apply(LinearQuantized, x, a, core, b, bias, (quant, layout, scaling, dropout, seed, kernels), *quant)
    else:
        y, _ = kernels.forward(x, quant, layout, a, core, b, bias, scaling, dropout, seed)
    return y


def linear_group(
    x: Tensor,
    lists: Sequence[Sequence[Tensor]],
    scalings: list[float],
    dropout: float,
    seeds: Tensor | None,
    kernels: Kernels,
) -> Sequence[Tensor]:
    """y_i of `lorasb::linear_group`; `lists`: weights, A, R, B and biases."""
    if torch.is_grad_enabled():
        tensors = [tensor for tensors in lists for tensor in tensors]
        outputs = _apply(LinearGroup, x, (scalings, dropout, seeds, kernels), *tensors)
    else:
        outputs = kernels.forward(x, *lists, scalings, dropout, seeds)
    return list(outputs[: len(scalings)])
