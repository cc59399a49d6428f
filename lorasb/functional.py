"""The functional API: adapted linears over dense and quantized weights, groups of them, and dequantization.
Shapes, dtypes and devices are checked here for all backends; then the current backend's op computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .backends import cpp, eager  # importing the package registers all backends
from .compat import torch as private
from .ops import calls
from .ops.adapted_linear import adapted_linear
from .ops.calls import DENSE, Operands, is_transformed
from .ops.registry import backend_op, current_backend, direct_kernels
from .quantization.quantized_weight import QuantizedWeight, of_weight


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

    Gradients: with u = x Aᵀ, t = dy B and w = s·t R, dR = s·tᵀ u and dx = dy W + w A; W, A, B and bias are frozen.
    Saved for backward: u [M, r], where M is the number of rows of x, but not x.

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
    x in fp32 or fp64 (below 6 MiB over dense weights on a CPU) and may raise a RuntimeError elsewhere: x is not saved.

    Returns:
        y [..., out] in x's dtype.

    Raises:
        ValueError: shapes, ranks or devices do not match, r is over 256, dropout is not in [0, 1) or comes with
            `index`, `index` does not have n entries or lora_R is not a stack, or x requires grad under inference mode.
        TypeError: dtypes do not match, x is not floating point, or `index` is a tensor that is not int64 on the CPU.
        IndexError: an entry of `index` is out of range.
    """
    quantized = of_weight(weight) if isinstance(weight, QuantizedWeight) or hasattr(weight, "quant_state") else None
    if quantized is not None and index is None and dropout == 0.0:
        y = _served(x, quantized, lora_A, lora_R, lora_B, bias, scaling)
        if y is not None:
            return y
    base = quantized or ([] if weight is None else [cast(Tensor, weight)])
    biases = [] if bias is None else [bias]
    return _call(x, base, ([lora_A], [lora_R], [lora_B], biases), [float(scaling)], dropout, index)[0]


def _call(
    x: Tensor,
    base: QuantizedWeight | list[Tensor],
    adapters: tuple[list[Tensor], ...],  # A, R, B and biases
    scalings: list[float],
    dropout: float,
    index: Tensor | Sequence[int] | None,
) -> list[Tensor]:
    """Check operands and return all y_j by the cheapest of three ways: torch's own ops, the kernels, the op."""
    a, cores, b, biases = adapters
    quantized, weights = (base, []) if isinstance(base, QuantizedWeight) else (None, base)
    # Cast before the checks and the op, which require equal dtypes; the kernels switch autocast off.
    if private.any_autocast() and calls.autocast_on(x.device.type):
        x, (weights, a, b, biases) = calls.cast_lists(x, [weights, a, b, biases])
    if index is not None or dropout != 0.0:
        index = _row_index(index, dropout)
    if quantized is not None:  # the packed weight is checked where it is read from a layer
        _check_quantized(quantized, x, a[0], b[0])
    lists = weights, a, cores, b, biases
    # torch.compile traces through the checks, and would guard on all known signatures.
    compiling = torch.compiler.is_compiling()
    stored = None if quantized is None else quantized.tensors
    signature = None if compiling else calls.signature_of(x, *lists, index, stored)
    plain = signature is not None  # plain tensors on one device, and nothing intercepts their ops
    if not plain or signature not in calls.known or len(scalings) != len(a):
        calls.check(x, lists, scalings, index)
        if plain:
            calls.remember(signature)
    if x.requires_grad and not compiling and torch.is_inference_mode_enabled():
        raise ValueError(
            "expected x without requires_grad under torch.inference_mode(): use torch.no_grad() or pass x.detach()"
        )
    if not plain and is_transformed():
        weights = weights if quantized is None else [dequantize(quantized, x.dtype)]
        operands = Operands(weights, DENSE, a, cores, b, biases, scalings, index, dropout)
        if index is not None:
            eager.check_index(index, min(map(len, cores)))
        return [eager.transformed(x, one, dropout, index) for one in operands.members()]
    tensors, layout = (weights, DENSE) if quantized is None else (quantized.tensors, quantized.layout(x.dtype))
    backend = current_backend()
    # Plain tensors skip the dispatcher: two passes through it and back take as long as a small layer's adapter.
    kernels = direct_kernels.get((backend, x.device.type)) if plain else None
    if kernels and x.is_cpu and quantized is None and index is None and dropout == 0.0:
        # Small dense calls that torch would compute anyway are faster as a composition of torch ops.
        forward = kernels.forward
        if forward is eager.eager_forward or (forward is cpp.forward and not cpp.computes(x, weights)):
            ys = eager.composed(x, lists, scalings)
            if ys is not None:
                return ys
    # On the CPU for any device of x, so that reading the seeds does not synchronize with a GPU.
    seeds = torch.randint(2**63 - 1, (len(a),), dtype=torch.int64, device="cpu") if dropout > 0.0 else None
    operands = Operands(tensors, layout, a, cores, b, biases, scalings, index, dropout, seeds)
    return adapted_linear(x, operands, backend, kernels)


def _row_index(index: Tensor | Sequence[int] | None, dropout: float) -> Tensor | None:
    """Return the index as a tensor; raise if dropout is out of range, or is combined with an index."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"expected dropout in [0, 1), the probability that an element is dropped, got {dropout}")
    if index is not None and dropout != 0.0:
        raise ValueError(f"expected dropout 0 with an index of rows, got {dropout}: it draws one mask for one adapter")
    if index is None or isinstance(index, Tensor):
        return index
    rows = list(index)
    if not all(
        hasattr(row, "__index__") and not isinstance(row, bool) for row in rows
    ):  # torch.tensor would round them
        raise TypeError(f"expected index as integers, the number of each row's adapter, got {rows}")
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _check_quantized(weight: QuantizedWeight, x: Tensor, a: Tensor, b: Tensor) -> None:
    if weight.shape != (b.shape[0], a.shape[-1]):
        raise ValueError(f"expected a quantized weight [{b.shape[0]}, {a.shape[-1]}], got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"expected a quantized weight on x's device {x.device}, got {weight.device}: move one of them")


def _served(x: Tensor, weight: QuantizedWeight, *others: Tensor | float | None) -> Tensor | None:
    """Return y by the extension's `serve_quantized`, if it applies, else None; `others`: A, R, B, the bias and s."""
    if torch.is_grad_enabled() or not x.is_cpu or is_transformed() or private.any_autocast():
        return None
    # For a single token, the checks and the choice of a kernel in Python take as long as the product itself.
    if cpp.serve_quantized is None or current_backend() not in ("auto", "cpp"):
        return None
    if calls.is_captured():  # a graph may run with gradients, which this op does not have
        return None
    return cpp.serve_quantized(x, weight.tensors, weight.layout(), *weight.shape, *others)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias over a quantized weight, without an adapter. Differentiable with respect to x.

    Args:
        x: [..., in], fp64, fp32, bf16 or fp16.
        weight: W [out, in].
        bias: [out] in x's dtype.

    Returns:
        y [..., out] in x's dtype.
    """
    y = _served(x, weight, None, None, None, bias, 1.0)
    if y is not None:
        return y
    out_features, in_features = weight.shape
    # An adapter of rank 0: its terms are empty sums in forward and in dx.
    a, b = x.new_empty((0, in_features)), x.new_empty((out_features, 0))
    core, biases = x.new_empty((0, 0), dtype=torch.float32), [] if bias is None else [bias]
    return _call(x, weight, ([a], [core], [b], biases), [1.0], 0.0, None)[0]


@torch.no_grad()
def dequantize(weight: Tensor | QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
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
    return backend_op("dequantize", current_backend())(*arguments)


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

    One pass over x in forward and one write of dx in backward, instead of one per member. Arguments are as for
    `lora_sb_linear`, with one entry per member; empty `biases` mean no bias, empty `scalings` s = 1. Each member has
    its own dropout mask, as from separate calls in the same order. With `index` [n], each lora_R is a stack [K, r, r],
    and row x[i] of x [n, ..., in] is computed with lora_R_j[index[i]] in every member j.

    Returns:
        The y_i [..., out_i].

    Raises:
        ValueError: as in `lora_sb_linear`, or the members' numbers of entries or ranks differ.
        TypeError: as in `lora_sb_linear`.
        IndexError: an entry of `index` is out of range.
    """
    if not weights:
        raise ValueError(f"expected one of each argument for every member, got no weights for {len(lora_A)} members")
    scales = list(map(float, scalings)) or [1.0] * len(weights)
    adapters = list(lora_A), list(lora_R), list(lora_B), list(biases)
    return _call(x, list(weights), adapters, scales, dropout, index)
