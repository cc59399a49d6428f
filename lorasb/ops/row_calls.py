"""Calls of the linears with an R for each row: what is cast, checked and computed, of one layer and of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import torch as private
from ..quantization.quantized_weight import QuantizedWeight
from . import autocast, fast_path, operand_checks
from .linear_rows import NO_QUANT, check_index
from .registry import backend_op, current_backend
from .signatures import is_transformed

Index = Tensor | Sequence[int]


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    a: Tensor,
    cores: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    index: Index,
) -> Tensor:
    """y [..., out] of `lorasb::linear_rows`; arguments and errors as of `functional.lora_sb_linear`."""
    quantized = weight if isinstance(weight, QuantizedWeight) else None
    dense: Any = None if quantized is not None else weight
    _check_dropout(dropout)
    if autocast.is_on(x):
        x, dense, a, b, bias = autocast.cast(x, dense, a, b, bias)
    index, plain = operand_checks.pass_rows(x, dense, a, cores, b, bias, index)
    if quantized is not None and (quantized.shape != (b.shape[0], a.shape[1]) or quantized.device != x.device):
        raise ValueError(
            f"expected a quantized weight [{b.shape[0]}, {a.shape[1]}] on {x.device}, got {list(quantized.shape)} on "
            f"{quantized.device}"
        )
    if not plain and is_transformed():
        if quantized is not None:
            dense = backend_op("dequantize", current_backend())(
                quantized.tensors, quantized.layout(x.dtype), *quantized.shape, x.dtype
            )
        check_index(index, len(cores))
        return fast_path.transformed(x, dense, a, cores, b, bias, scaling, index=index)
    quant, layout = (list(quantized.tensors), quantized.layout(x.dtype)) if quantized is not None else NO_QUANT
    arguments = x, dense, quant, layout, a, cores, b, bias, index, scaling
    # what a quantized weight consists of has no part in the signature
    y: Tensor = _call("linear_rows", plain and not quant, (dense, a, cores, b, bias, *quant), arguments)[0]
    return y


def group(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    cores: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor],
    scalings: Sequence[float],
    dropout: float,
    index: Index,
) -> list[Tensor]:
    """The y_j [..., m_j] of `lorasb::linear_rows_group`; the rest as of `functional.lora_sb_linear_group`."""
    _check_dropout(dropout)
    operand_checks.same_lengths(weights, a, cores, b, scalings, biases or weights)
    frozen = [list(weights), list(a), list(b), list(biases)]
    if autocast.is_on(x):
        x, frozen = autocast.cast_lists(x, frozen)
    (weights, a, b, biases), cores = frozen, list(cores)
    plain = True
    bias_or_none: Sequence[Tensor | None] = biases or [None] * len(weights)
    members = list(zip(weights, a, cores, b, bias_or_none, strict=True))
    for member in members:
        index, passed = operand_checks.pass_rows(x, *member, index)
        plain = plain and passed
    if not plain and is_transformed():
        return [linear(x, *member, s, 0.0, index) for member, s in zip(members, scalings, strict=True)]
    arguments = x, weights, a, cores, b, biases, index, list(scalings)
    outputs = _call("linear_rows_group", plain, (*weights, *a, *cores, *b, *biases), arguments)
    return list(outputs[: len(weights)])  # the u_j follow, which only backward uses


def _check_dropout(dropout: float) -> None:
    if dropout != 0.0:
        raise ValueError(f"expected dropout 0 with an index of rows, got {dropout}: it draws one mask for one adapter")


def _call(op: str, plain: bool, others: Sequence[Tensor | None], arguments: tuple[Any, ...]) -> Any:
    """The outputs for x and others: of the kernel itself where no gradient is recorded and nothing intercepts.

    `plain`: whether all of them have been found to be plain tensors on x's device.
    """
    backend, x, kernels = current_backend(), arguments[0], None
    if not torch.is_grad_enabled():
        kernels = fast_path.plain_kernels(op, backend, x) if plain else fast_path.kernels(op, backend, x, *others)
    if kernels is None:
        return backend_op(op, backend)(*arguments)
    with private.BelowAutograd():
        return kernels.forward(*arguments)
