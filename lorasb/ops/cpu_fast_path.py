"""Calls that go straight to the kernel which the dispatcher would choose: on the CPU, and on plain tensors only.

Two trips through the dispatcher and back into Python cost as much time as a small layer's adapter. What is kept and
what autograd calls are the op's own; whatever traces, transforms or wraps tensors meets the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import linear as linear_op
from . import linear_group, linear_quantized, registry

SMALL_BYTES = 6 * 2**20  # of x: between 4096 features x 512 tokens in bf16 and in fp32, where the two cross (measured)
_PLAIN = (Tensor, torch.nn.Parameter)
Kernels = tuple[Callable[..., Any], Callable[..., Any]]


def kernels(op: str, backend: str, *tensors: Tensor | None) -> Kernels | None:
    """The op's forward and backward on the CPU, where nothing needs to see the op itself; else None."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or not tensor.is_cpu):
            return None
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    forward, backward = registry.cpu_kernel(op, backend), registry.cpu_kernel(f"{op}_backward", backend)
    return (forward, backward) if forward is not None and backward is not None else None


def small(x: Tensor, frozen: Iterable[Tensor | None]) -> bool:
    """Whether a call is better composed of torch's own ops: without gradients, or where Python's part in a backward of
    our own costs more than the pass over dx that it saves."""
    if x.dtype == torch.float16:  # fp16 would overflow in dR
        return False
    if torch.is_autocast_enabled("cpu"):  # it would cast R's product too
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in frozen):  # W, A, B and bias get no gradients
        return False
    return not torch.is_grad_enabled() or x.numel() * x.element_size() < SMALL_BYTES


def composed(
    x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = x Wᵀ + bias, then s·x Aᵀ Rᵀ Bᵀ accumulated onto it; autograd keeps u and not x, as W and A are frozen."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scaled = core if scaling == 1.0 else core * scaling
    v = linear(linear(rows, a), scaled.to(x.dtype))
    y = linear(v, b, bias) if weight is None else linear(rows, weight, bias).addmm_(v, b.t())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[0])


class Linear(torch.autograd.Function):
    """`lorasb::linear` without the dispatcher: the op's arguments, then its two kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, (forward, ctx.kernel) = arguments
        output: tuple[Tensor, Tensor] = forward(*inputs)
        linear_op.save(ctx, tuple(inputs), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*linear_op.derivative(ctx.kernel)(ctx, dy, du), None)


class LinearQuantized(torch.autograd.Function):
    """`lorasb::linear_quantized` without the dispatcher: the op's arguments, its two kernels, the list's tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, (forward, ctx.kernel) = arguments[:10], arguments[10]
        output: tuple[Tensor, Tensor] = forward(*inputs)
        linear_quantized.save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Any, ...]:
        found = linear_quantized.derivative(ctx.kernel)(ctx, dy, du)
        return found[0], None, *found[2:], None, *found[1]


class LinearGroup(torch.autograd.Function):
    """`lorasb::linear_group` without the dispatcher: x, the scalings, the two kernels, then every list's tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], kernels: Kernels, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(scalings)
        lists = [list(tensors[i * count : (i + 1) * count]) for i in range(5)]
        forward, ctx.kernel = kernels
        output = forward(x, *lists, scalings)
        linear_group.save(ctx, (x, *lists, scalings), output)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, dcores = linear_group.gradients(ctx.kernel, ctx, grads)
        nothing = [None] * len(dcores)
        return (dx, None, None, *nothing, *nothing, *dcores, *nothing, *[None] * ctx.biases)
