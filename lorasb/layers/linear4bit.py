"""`Linear4bit`: a frozen linear layer in 4 bits with bitsandbytes' storage and file format, without bitsandbytes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..functional import quantized_linear
from ..quantization.quant_state import BYTES, QuantState, seen_as
from ..quantization.quantized_weight import QuantizedWeight, of_state
from ..utils.deprecation import renamed_method


class Linear4bit(nn.Linear):
    """y = x Wᵀ + bias with W [out, in] frozen in 4 bits. Made by `lorasb.quantize`; bitsandbytes loads its files.

    Args:
        packed: W's nibbles, [ceil(out·in / 2), 1] uint8; or those bytes seen as another dtype (`seen_as`).
        quant_state: W's statistics.
        bias: [out], or None.
        compute_dtype: what products are taken in; x's unless given.

    Forward: x [..., in] -> y [..., out] in x's dtype.
    """

    def __init__(
        self, packed: Tensor, quant_state: QuantState, bias: Tensor | None, compute_dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        shape = quant_state.shape or (0, 0)
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        self.quant_state, self.compute_dtype = quant_state, compute_dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._read: tuple[Any, QuantizedWeight] | None = None

    def quantized(self) -> QuantizedWeight:
        """The storage, checked once."""
        if self._read is not None and torch.compiler.is_compiling():  # a graph has no pointers
            return self._read[1]
        key = (self.weight.data_ptr(), self.weight._version, id(self.quant_state))
        if self._read is None or self._read[0] != key:
            self._read = key, of_state(self.weight, self.quant_state)
        return self._read[1]

    quantised = renamed_method("quantised", "quantized")

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out]."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return quantized_linear(x.to(dtype), self.quantized(), bias).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """Moves to another device take the statistics along; a change of dtype changes the bias alone."""
        packed = self.weight
        if packed.is_floating_point() and type(packed.data) is Tensor:  # bytes, whatever they are seen as
            self._parameters["weight"] = None
            super()._apply(fn, recurse)
            moved = fn(packed.data.view(torch.uint8))
            packed.data = moved.view(packed.dtype)
            self._parameters["weight"] = cast("nn.Parameter", packed)
        else:
            super()._apply(fn, recurse)
        if self.weight.device != self.quant_state.absmax.device:
            self.quant_state = self.quant_state.to(self.weight.device)
        if self._read is not None and not self.weight.is_meta:
            self.quantized()
        return self

    def _sharded(self) -> bool:
        """Whether FSDP2 has shared the packed bytes out; every process has all statistics, which are no parameters."""
        return hasattr(self.weight, "device_mesh")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._sharded():  # a checkpoint of an adapter's training holds nothing of the base
            return
        for name, tensor in self.quant_state.as_tensors().items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        start = f"{prefix}weight."
        found = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].dtype != self.weight.dtype and self.weight.dtype in BYTES:
            state_dict[name] = seen_as(state_dict[name], self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]
        if found:
            try:
                state = QuantState.of_tensors(found).to(self.weight.device)
                of_state(self.weight, state)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
                return
            self.quant_state = state
        elif strict and not self._sharded():
            missing.append(f"{start}absmax")

    def extra_repr(self) -> str:
        """For print(model)."""
        state = self.quant_state
        nested = ", nested" if state.nested else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {state.quant_type}{nested}"
