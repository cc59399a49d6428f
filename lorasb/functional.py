"""The functional API: adapted linears over dense and quantized weights, groups of them, and dequantization.

Shapes, dtypes and devices are checked here, which every backend relies on; the current backend's op computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .backends import cpp  # importing the package registers all backends
from .backends.eager import linear as eager
from .ops import autocast, fast_path, operand_checks, row_calls
from .ops.registry import backend_op, current_backend, direct_kernel
from .ops.signatures import is_transformed
from .quantization.quantized_weight import QuantizedWeight, of_weight
from .utils.deprecation import warn_renamed


def lora_sb_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_A: Tensor,
    lora_R: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    index: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias (paper, Eq. 3), or with one R per row of a batch.

    Gradients: with u = x Aᵀ, t = dy B and w = s·t R, dR = s·tᵀ u and dx = dy W + w A. W, A, B and bias are frozen and
    get no gradients. Saved for backward: u [M, r], where M is the number of rows of x, but not x.

    Args:
        x: [..., in], fp64, fp32, bf16 or fp16; one to four dimensions, M = 0 included.
        weight: W [out, in] in x's dtype, a 4-bit parameter with its `quant_state`, a `QuantizedWeight`, or None for the
            adapter's term alone.
        lora_A: [r, in] in x's dtype.
        lora_R: [r, r], fp32 for any dtype of x (fp64 for fp64).
        lora_B: [out, r] in x's dtype.
        bias: [out] in x's dtype.
        scaling: s.
        dropout: probability of dropping an element of the adapter's input; backward regenerates the mask from a seed.
        index: [n], int64 on the CPU or a list. lora_R is then [K, r, r], and row x[i] of x [n, ..., in] is computed
            with lora_R[index[i]]; -1 is the base alone. dR_k sums over its own rows in their order.

    Under autocast x, W, A, B and bias are cast as `F.linear` would cast them; R is not.

    Under `torch.func` (`jvp`, `vmap`, `hessian`, per-sample gradients by `vmap(grad)`) and forward-mode AD, torch's own
    operations compute, with every derivative. `autograd.grad(..., create_graph=True)` has a second derivative for small
    x (below 6 MiB over dense weights on a CPU) and raises a RuntimeError elsewhere, since x is not saved.

    Returns:
        y [..., out] in x's dtype.

    Raises:
        ValueError: shapes, ranks or devices do not match, dropout is not in [0, 1), or x requires grad under inference
            mode.
        TypeError: dtypes do not match, or x is not floating point.
        IndexError: an entry of `index` is no adapter's.
    """
    quantized = of_weight(weight)
    if index is not None:
        given = quantized or cast("Tensor | None", weight)
        return row_calls.linear(x, given, lora_A, lora_R, lora_B, bias, scaling, dropout, index)
    if quantized is not None:
        return _over_quantized(x, quantized, lora_A, lora_R, lora_B, bias, scaling, dropout)
    return _over_dense(x, cast("Tensor | None", weight), lora_A, lora_R, lora_B, bias, scaling, dropout)


def _over_dense(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_R: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    # Before the checks and the op, which ask for equal dtypes; the kernels switch autocast off.
    if autocast.is_on(x):
        x, weight, lora_A, lora_B, bias = autocast.cast(x, weight, lora_A, lora_B, bias)
    tensors = (x, weight, lora_A, lora_R, lora_B, bias)
    plain = operand_checks.pass_linear(*tensors)
    if not plain and is_transformed():
        return fast_path.transformed(*tensors, scaling, _checked(dropout))
    arguments = (*tensors, scaling, dropout, _seed(dropout))
    backend = current_backend()
    kernels = _kernels("linear", backend, plain, tensors)
    # Three ways, the cheapest first: torch's own ops, the kernel by an autograd function, the op by the dispatcher.
    if kernels and dropout == 0.0 and _composes(kernels, x, (weight,), (lora_A, lora_B, bias)):
        return fast_path.composed(*arguments[:7])
    if kernels:
        return fast_path.linear(*arguments, kernels)
    y: Tensor
    y, _ = backend_op("linear", backend)(*arguments)
    return y


def _kernels(op: str, backend: str, plain: bool, tensors: Sequence[Any]) -> fast_path.Kernels | None:
    """Return the op's direct kernels if every operand is a plain tensor, else None."""
    return fast_path.plain_kernels(op, backend, tensors[0]) if plain else fast_path.kernels(op, backend, *tensors)


def _composes(
    kernels: fast_path.Kernels, x: Tensor, weights: Sequence[Tensor | None], frozen: Sequence[Tensor | None]
) -> bool:
    """True if a small call is faster composed of torch's own ops, as far as those would compute it in any case.

    `cpp` computes dense layers by eager torch too, unless the extension serves their dtype and size, or few tokens.
    """
    served = cpp.serves(x.dtype, *weights) or cpp.serves_few(x, *weights)
    uses_extension = served and kernels.forward in (cpp.forward, cpp.group_forward)
    uses_torch = kernels.forward in (cpp.forward, cpp.group_forward, eager.forward, eager.group_forward)
    return x.is_cpu and uses_torch and not uses_extension and fast_path.small(x, (*weights, *frozen))


def _seed(dropout: float, count: int = 1) -> Tensor | None:
    """Seeds [count] for dropout masks, drawn from the CPU generator; None without dropout."""
    # On the CPU for any device of x, so that reading it does not synchronize with a GPU.
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device="cpu") if _checked(dropout) > 0.0 else None


def _checked(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"expected dropout in [0, 1), the probability that an element is dropped, got {dropout}")
    return dropout


def _over_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    # Before autocast and the checks, which `serve_quantized` does itself in less time.
    transformed = is_transformed()
    if dropout == 0.0 and not torch.is_grad_enabled() and x.is_cpu and not transformed:
        y = _served(x, weight, a, core, b, bias, scaling)
        if y is not None:
            return y
    if autocast.is_on(x):
        x, a, b, bias = autocast.cast(x, a, b, bias)
    if weight.shape != (b.shape[0], a.shape[-1]):
        raise ValueError(f"expected a quantized weight [{b.shape[0]}, {a.shape[-1]}], got {list(weight.shape)}")
    operand_checks.pass_linear(x, None, a, core, b, bias)  # the packed weight is checked where it is read from a layer
    if weight.device != x.device:
        raise ValueError(
            f"expected the quantized weight on x's device {x.device}, got {weight.device}: move one of the two"
        )
    if transformed:
        return fast_path.transformed(x, dequantize(weight, x.dtype), a, core, b, bias, scaling, _checked(dropout))
    backend, quant, layout = current_backend(), weight.tensors, weight.layout(x.dtype)
    arguments = (x, quant, layout, a, core, b, bias, scaling, dropout, _seed(dropout))
    kernels = fast_path.kernels("linear_quantized", backend, x, a, core, b, bias, *quant)
    if kernels:
        return fast_path.linear_quantized(*arguments, kernels)
    result: tuple[Tensor, Tensor] = backend_op("linear_quantized", backend)(*arguments)
    return result[0]


def _served(
    x: Tensor,
    weight: QuantizedWeight,
    a: Tensor | None,
    core: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor | None:
    """y from the current backend's `serve_quantized`; None if it has none.

    The op checks, casts and computes in one call: for a single token, the checks and the choice of a kernel in Python
    take as long as the product itself.
    """
    serve = direct_kernel("serve_quantized", current_backend())
    if serve is None:
        return None
    y: Tensor = serve(x, weight.tensors, weight.storage_layout, *weight.shape, a, core, b, bias, scaling)
    return y


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias over a quantized weight, without an adapter. Differentiable with respect to x.

    Args:
        x: [..., in], fp64, fp32, bf16 or fp16.
        weight: W [out, in].
        bias: [out] in x's dtype.

    Returns:
        y [..., out] in x's dtype.
    """
    if not torch.is_grad_enabled() and x.is_cpu and not is_transformed():
        y = _served(x, weight, None, None, None, bias, 1.0)
        if y is not None:
            return y
    out_features, in_features = weight.shape
    # An adapter of rank 0: its terms are empty sums in forward and in dx.
    a, b = x.new_empty((0, in_features)), x.new_empty((out_features, 0))
    return _over_quantized(x, weight, a, x.new_empty((0, 0), dtype=torch.float32), b, bias, 1.0, 0.0)


@torch.no_grad()
def dequantize(weight: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Dequantize a weight to W [out, in]; NF4 and FP4 bit-equal to bitsandbytes' `dequantize_4bit`.

    Args:
        weight: a 4-bit parameter with its `quant_state` (`Linear4bit.weight`), or a `QuantizedWeight` of 4 or 8 bits.
        dtype: of the result; the dtype that W was quantized from if None.

    Raises:
        TypeError: the weight is a dense tensor.
        ValueError: the packed weight and its statistics do not belong together, or are not finite.
    """
    quantized = of_weight(weight)
    if quantized is None:
        raise TypeError(f"expected a 4-bit parameter with a quant_state, got a {type(weight).__name__} without one")
    dtype = dtype or quantized.dtype
    arguments = (quantized.tensors, quantized.layout(dtype), *quantized.shape, dtype)
    dense: Tensor = backend_op("dequantize", current_backend())(*arguments)
    return dense


def lora_sb_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_R: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    scalings: Sequence[float] = (),
    *,
    dropout: float = 0.0,
    index: Tensor | Sequence[int] | None = None,
) -> list[Tensor]:
    """y_i = x W_iᵀ + s_i·x A_iᵀ R_iᵀ B_iᵀ + bias_i for linears that read the same x.

    One pass over x in forward and one write of dx in backward, where separate calls read x and add to dx once per
    member. Arguments are as for `lora_sb_linear`, with one entry per member; empty `biases` mean no bias for any
    member, empty `scalings` mean s = 1 for all. `dropout` is that of all members, each with its own mask, which
    separate calls in the same order would draw too. With `index` [n], each lora_R is a stack [K, r, r], and row x[i] of
    x [n, ..., in] is computed with lora_R_j[index[i]] in every member j.

    Returns:
        The y_i [..., out_i].

    Raises:
        ValueError: shapes, devices or numbers of entries do not match, or ranks differ.
        TypeError: dtypes do not match.
        IndexError: an entry of `index` is no adapter's.
    """
    scalings = list(scalings) or [1.0] * len(weights)
    if index is not None:
        return row_calls.group(x, weights, lora_A, lora_R, lora_B, biases, scalings, dropout, index)
    if autocast.is_on(x):
        operand_checks.same_lengths(weights, lora_A, lora_R, lora_B, biases or weights)
        x, cast_lists = autocast.cast_lists(x, [list(weights), list(lora_A), list(lora_B), list(biases)])
        weights, lora_A, lora_B, biases = cast_lists
    lists = [list(tensors) for tensors in (weights, lora_A, lora_R, lora_B, biases)]
    plain = operand_checks.pass_group(x, scalings, *lists)
    bias_or_none: list[Any] = list(biases) or [None] * len(weights)
    members: list[Any] = list(zip(weights, lora_A, lora_R, lora_B, bias_or_none, scalings, strict=True))
    if not plain and is_transformed():
        return [
            fast_path.transformed(x, w, a, core, b, bias, s, _checked(dropout)) for w, a, core, b, bias, s in members
        ]
    backend = current_backend()
    kernels = _kernels("linear_group", backend, plain, [x, *itertools.chain(*lists)])
    seeds = _seed(dropout, len(weights))
    if kernels and seeds is None and _composes(kernels, x, weights, (*lora_A, *lora_B, *biases)):
        return [fast_path.composed(x, *member) for member in members]
    if kernels:
        return list(fast_path.linear_group(x, lists, scalings, dropout, seeds, kernels))
    outputs = backend_op("linear_group", backend)(x, *lists, scalings, dropout, seeds)
    return list(outputs[: len(weights)])  # the u_i follow, which only backward uses


_RENAMED = {"quantised_linear": "quantized_linear", "dequantize_nf4": "dequantize"}


def __getattr__(name: str) -> Any:
    """Former names of functions, with a deprecation warning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.{name}", f"{__name__}.{_RENAMED[name]}")
    return globals()[_RENAMED[name]]
