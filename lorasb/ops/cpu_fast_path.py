"""Direct calls of the kernel that the dispatcher would choose, for plain tensors on the CPU.

Two passes through the dispatcher and back into Python take as long as a small layer's adapter. The autograd functions
here share `save` and `derivative` with the ops, so both ways compute the same; tracing, functorch transforms, tensor
subclasses and dispatch modes always get the op itself.
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

# Bytes of x below which torch's own ops are faster than our autograd function. Measured with 4096 features and 512
# tokens: bf16 (4 MiB) is below the crossover, fp32 (8 MiB) above.
SMALL_BYTES = 6 * 2**20
_PLAIN = (Tensor, torch.nn.Parameter)
Kernels = tuple[Callable[..., Any], Callable[..., Any]]  # forward, backward


def kernels(op: str, backend: str, *tensors: Tensor | None) -> Kernels | None:
    """The op's forward and backward kernels on the CPU; None if something has to intercept the op itself."""
    for tensor in tensors:  # by exact type: subclasses (DTensor, FakeTensor) intercept ops in __torch_dispatch__
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
    v = linear(linear(rows, a), scaled.to(x.dtype))
    # In place: linear saves its inputs and not its result, so overwriting that does not invalidate the graph.
    y = linear(v, b, bias) if weight is None else linear(rows, weight, bias).addmm_(v, b.t())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[0])


class Linear(torch.autograd.Function):
    """`lorasb::linear` without the dispatcher. Arguments: the op's, then (forward kernel, backward kernel)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, (forward, ctx.kernel) = arguments
        output: tuple[Tensor, Tensor] = forward(*inputs)
        linear_op.save(ctx, tuple(inputs), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*linear_op.derivative(ctx.kernel)(ctx, dy, du), None)  # None for the pair of kernels


class LinearQuantized(torch.autograd.Function):
    """`lorasb::linear_quantized` without the dispatcher.

    Arguments: the op's (`quant` is the second), the pair of kernels, then the tensors of `quant` once more: an autograd
    function sees only tensors that are arguments themselves, not those inside of lists.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, (forward, ctx.kernel) = arguments[:10], arguments[10]
        output: tuple[Tensor, Tensor] = forward(*inputs)
        linear_quantized.save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Any, ...]:
        dx, dquant, *others = linear_quantized.derivative(ctx.kernel)(ctx, dy, du)
        return dx, None, *others, None, *dquant


class LinearGroup(torch.autograd.Function):
    """`lorasb::linear_group` without the dispatcher.

    Arguments: x, the scalings, the pair of kernels, then the tensors of all lists, flattened in the order of the op's
    arguments: weights, A, R, B, biases (which may be none).
    """

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
        no_grads = [None] * len(dcores)
        return (dx, None, None, *no_grads, *no_grads, *dcores, *no_grads, *[None] * ctx.biases)
