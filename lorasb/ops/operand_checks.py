"""Operand validation; a call whose signature has passed is not checked again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..constants import MAX_RANK
from ..utils.precision import FLOATS
from . import signatures

_known = signatures.Known()


# weights, A, R, B and biases of each member; the first (checked elsewhere if quantized) and the last may be empty
Lists = tuple[Sequence[Tensor], ...]


def check(x: Tensor, lists: Lists, scalings: Sequence[float], index: Tensor | None) -> bool:
    """Check a call, unless its signature has passed before; True if all operands are plain tensors on one device."""
    if torch.compiler.is_compiling():  # which takes the checks apart, and would guard on all signatures that are known
        _check(x, lists, scalings, index)
        return False
    signature = signatures.of(x, *lists, index)
    if not _known.has(signature) or len(scalings) != len(lists[1]):
        _check(x, lists, scalings, index)
        _known.add(signature)
    if x.requires_grad and torch.is_inference_mode_enabled():
        raise ValueError(
            "expected x without requires_grad under torch.inference_mode(), which records no gradient: use "
            "torch.no_grad() or pass x.detach()"
        )
    return signature is not None


def _check(x: Tensor, lists: Lists, scalings: Sequence[float], index: Tensor | None) -> None:
    weights, a, cores, b, biases = lists
    lengths = [len(entries) for entries in (weights or a, a, cores, b, scalings, biases or a)]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"expected one of each argument for every member, got {lengths} of them")
    ranks = [factor.shape[0] for factor in a]
    if len(set(ranks)) != 1:
        raise ValueError(f"expected one rank for all members, got {ranks}")
    for j in range(len(a)):
        # the range of the index is checked where it is used, so that compiled calls are checked too
        core = cores[j] if index is None else _of_stack(x, cores[j], index)
        check_linear(x, weights[j] if weights else None, a[j], core, b[j], biases[j] if biases else None)


def _of_stack(x: Tensor, cores: Tensor, index: Tensor) -> Tensor:
    if cores.dim() != 3:
        raise ValueError(f"expected lora_R [K, r, r] with an index of rows, got {_shape(cores)}")
    if index.dim() != 1 or index.dtype != torch.int64 or not index.is_cpu:
        raise TypeError(
            f"expected index [n] in int64 on the CPU, got {_shape(index)} in {index.dtype} on {index.device}"
        )
    if x.dim() < 2 or len(index) != x.shape[0]:
        raise ValueError(f"expected an index for each of the rows of x [n, ..., in], got {len(index)} for {_shape(x)}")
    return cores[0] if len(cores) else cores.new_empty(cores.shape[1:])


def check_linear(x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raise where shapes, ranks, dtypes or devices do not match."""
    if a.dim() != 2 or b.dim() != 2 or core.dim() != 2 or a.shape[0] > MAX_RANK:
        raise ValueError(
            f"expected lora_A [r, in], lora_R [r, r] and lora_B [out, r] with r <= {MAX_RANK}, "
            f"got {_shape(a)}, {_shape(core)} and {_shape(b)}"
        )
    (r, features_in), (features_out, columns) = a.shape, b.shape
    if columns != r or core.shape != (r, r):
        raise ValueError(f"ranks differ: lora_A {_shape(a)}, lora_R {_shape(core)}, lora_B {_shape(b)}")
    if x.dim() < 1 or x.shape[-1] != features_in:
        raise ValueError(f"expected x [..., {features_in}] (in_features of lora_A), got {_shape(x)}")
    if weight is not None and weight.shape != (features_out, features_in):
        raise ValueError(f"expected weight [{features_out}, {features_in}], got {_shape(weight)}")
    if bias is not None and bias.shape != (features_out,):
        raise ValueError(f"expected bias [{features_out}], got {_shape(bias)}")
    _check_dtypes_and_devices(x, weight, a, core, b, bias)


def _check_dtypes_and_devices(
    x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None
) -> None:
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS:
        raise TypeError(f"expected x in fp64, fp32, bf16 or fp16, got {dtype}")
    if not core.is_floating_point():
        raise TypeError(f"expected lora_R in fp32, got {core.dtype}")
    for name, tensor in (("weight", weight), ("lora_A", a), ("lora_B", b), ("bias", bias), ("lora_R", core)):
        if tensor is None:
            continue
        if tensor.dtype != dtype and tensor is not core:
            raise TypeError(f"expected {name} in x's dtype {dtype}, got {tensor.dtype}: cast one of the two")
        if tensor.device != device:
            raise ValueError(f"expected {name} on x's device {device}, got {tensor.device}: move one of the two")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
