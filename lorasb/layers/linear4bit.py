"""`Linear4bit`: a frozen 4-bit linear with bitsandbytes' storage and files; quantization of models, merged ones too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..functional import dequantize, quantized_linear
from ..quantization.quantized_weight import BLOCKS, KINDS, QuantizedWeight, QuantState, of_state
from ..quantization.quantizer import quantize_4bit
from ..utils.precision import QUANTIZABLE
from .adapted_layer import AdaptedLayer
from .base import MergedBase
from .lookup import unchanged_on_error
from .opaque_base import OpaqueBase, has_dense_weight

# dtypes that packed bytes may be viewed as
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def view_as_storage(packed: Tensor, storage: torch.dtype) -> Tensor:
    """Packed bytes [n, 1] viewed as another dtype, zero-padded to a multiple of its size."""
    # bitsandbytes' `quant_storage`: FSDP groups parameters of one dtype only, so packed weights take the model's.
    octets = packed.reshape(-1).view(torch.uint8)
    octets = nn.functional.pad(octets, (0, -len(octets) % storage.itemsize))
    return octets.view(storage)[:, None]


class Linear4bit(nn.Linear):
    """y = x Wᵀ + bias with W [out, in] frozen in 4 bits. Made by `lorasb.quantize`; bitsandbytes loads its files.

    Args:
        packed: W's nibbles [ceil(out·in / 2), 1], uint8; or the same bytes viewed as another dtype (`view_as_storage`).
        quant_state: scales, table, block size, shape and dtype of W.
        bias: [out], or None.
        compute_dtype: dtype of the matrix product; x's dtype if None.

    Forward: x [..., in] -> y [..., out] in x's dtype.
    """

    def __init__(
        self, packed: Tensor, quant_state: QuantState, bias: Tensor | None, compute_dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and draw a dense weight
        shape = quant_state.shape or (0, 0)
        self.out_features, self.in_features = int(shape[0]), int(shape[1])
        self.quant_state, self.compute_dtype = quant_state, compute_dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._cached_weight: tuple[object, QuantizedWeight] | None = None

    def quantized(self) -> QuantizedWeight:
        """The checked storage; cached until the weight or the statistics change."""
        # Fake tensors have no data_ptr, and reading it would break the graph; `_apply` refreshes the cache.
        if self._cached_weight is not None and torch.compiler.is_compiling():
            return self._cached_weight[1]
        # The pointer changes with `weight.data = ...`, the version with in-place ops.
        key = (self.weight.data_ptr(), self.weight._version, id(self.quant_state))
        if self._cached_weight is None or self._cached_weight[0] != key:
            self._cached_weight = key, of_state(self.weight, self.quant_state)
        return self._cached_weight[1]

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return quantized_linear(x.to(dtype), self.quantized(), bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Move the packed weight and its statistics; a cast to another dtype changes the bias alone."""
        packed = self.weight
        if packed.is_floating_point() and type(packed.data) is Tensor:
            # Packed bytes viewed as floats: `fn` may be a cast, which would convert their values. It gets them as
            # uint8, which casts leave alone. A DTensor of FSDP2 passes through unchanged.
            self._parameters["weight"] = None
            try:
                super()._apply(fn, recurse)
                moved = fn(packed.data.view(torch.uint8))
                packed.data = moved.view(packed.dtype)
            finally:  # the move may fail on a GPU that is too small
                self._parameters["weight"] = cast("nn.Parameter", packed)
        else:
            super()._apply(fn, recurse)
        if self.weight.device != self.quant_state.absmax.device:  # no parameters or buffers: not reached by `_apply`
            self.quant_state = self.quant_state.to(self.weight.device)
        if self._cached_weight is not None and not self.weight.is_meta:  # a compiled forward does not check the cache
            self.quantized()
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # FSDP2's sharded state dicts are for checkpoints of adapter training, which do not contain the base.
        if not hasattr(self.weight, "device_mesh"):
            for name, tensor in self.quant_state.as_tensors().items():
                destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        missing, unexpected, errors = lists
        start = f"{prefix}weight."
        statistics = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        name = f"{prefix}weight"
        # The file may store the same bytes under another dtype; copy_ would convert values instead of bits.
        if name in state_dict and state_dict[name].dtype != self.weight.dtype and self.weight.dtype in STORAGE_DTYPES:
            octets = state_dict[name].reshape(-1).view(torch.uint8)[: -(-self.out_features * self.in_features // 2)]
            state_dict[name] = view_as_storage(octets, self.weight.dtype)  # padded for this dtype, not for the file's
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        unexpected[:] = [key for key in unexpected if not key.startswith(start)]
        if statistics:
            try:
                state = QuantState.of_tensors(statistics).to(self.weight.device)
                of_state(self.weight, state)  # raises if the statistics do not belong to the weight
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")  # load_state_dict raises for all errors together
                return
            self.quant_state = state
        elif strict and not hasattr(self.weight, "device_mesh"):  # FSDP2: every rank has all statistics
            missing.append(f"{start}absmax")

    def extra_repr(self) -> str:
        """Return the text for print(model)."""
        state = self.quant_state
        nested = ", nested" if state.nested else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {state.quant_type}{nested}"


LEFT_OUT = ("lm_head",)  # bitsandbytes' integration in transformers leaves the output head in 16 bits as well
HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "logits_proj")  # task heads
# Layers with these name parts are never quantized: heads and poolers, which train, and wo: T5 casts x to its dtype.
DENSE = (*HEADS, "pooler", "DenseReluDense.wo")


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    blocksize: int = 64,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
    exclude: Iterable[str] = LEFT_OUT,
) -> nn.Module:
    """Replace a model's linears by `Linear4bit`, in place; on any error the model is left unchanged.

    The storage equals bitsandbytes' bit for bit, and bitsandbytes loads the files. Output embeddings and task
    heads stay dense.

    Args:
        model: with `nn.Linear` layers in fp32, bf16 or fp16.
        kind: "nf4" or "fp4".
        blocksize: number of elements that share a scale: 32, 64, 128, ... 4096.
        nested: quantize the scales too ("double quantization"), which saves 0.4 bits per weight.
        compute_dtype: dtype of the matrix products; x's dtype if None.
        storage: dtype that the packed bytes are viewed as (bitsandbytes' `quant_storage`); FSDP2 needs the model's.
        exclude: full names, or parts of names between dots, of layers to leave dense.

    Returns:
        The model.

    Raises:
        ValueError: an unknown kind or block size, no linear to quantize, or a weight that is not finite.
    """
    choices = (("kind", kind, KINDS), ("blocksize", blocksize, BLOCKS), ("storage", storage, STORAGE_DTYPES))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    targets = list(_targets(model, {*exclude, *DENSE}))
    if not targets:
        raise ValueError("found no linear layer to quantize: expected nn.Linear in fp32, bf16 or fp16")
    for _, _, name, layer in targets:  # all weights before the first replacement
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {name!r} has NaN or Inf values: nothing was quantized")
    with unchanged_on_error(model):
        for parent, child, _, layer in targets:
            packed, state = quantize_4bit(layer.weight.detach(), kind, blocksize, nested)
            bias = None if layer.bias is None else layer.bias.detach()
            new = Linear4bit(view_as_storage(packed, storage), state, bias, compute_dtype)
            setattr(parent, child, new.train(layer.training))
    return model


def _targets(model: nn.Module, exclude: set[str]) -> Iterable[tuple[nn.Module, str, str, nn.Linear]]:
    """(parent, child name, full name, layer) of each plain linear that is neither excluded nor the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, parent in model.named_modules():
        for child, layer in parent.named_children():
            full = f"{name}.{child}" if name else child
            # Subclasses have their own forwards, and a weight on meta has no values to quantize.
            plain = type(layer) is nn.Linear and layer.weight.dtype in QUANTIZABLE and not layer.weight.is_meta
            if plain and layer is not head and not any(f".{part}." in f".{full}." for part in exclude):
                yield parent, child, full, layer


def quantized_bases(model: nn.Module) -> dict[str, QuantizedWeight | OpaqueBase]:
    """Return, by layer name, the 4-bit weights and other quantizers' layers that a model's adapters merge into."""
    bases: dict[str, QuantizedWeight | OpaqueBase] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLayer):
            continue
        base = layer.base.former if isinstance(layer.base, MergedBase) else layer.base
        weight = base.quantized()
        if isinstance(base, OpaqueBase) and not base.requantizes:
            raise ValueError(f"the {base.name} layer {name!r} cannot be quantized again: merge without requantize")
        if isinstance(base, OpaqueBase):
            bases[name] = base
        elif weight is not None and weight.kind in KINDS:
            bases[name] = weight
    if not bases:
        raise ValueError("expected a quantized layer under an adapter, got none: merge without requantize=True")
    return bases


@torch.no_grad()
def requantize(model: nn.Module, bases: dict[str, QuantizedWeight | OpaqueBase]) -> None:
    """Quantize again the layers of a merged model that had `quantized_bases`, and report the errors."""
    errors = {}
    for name, old in bases.items():
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear or not has_dense_weight(layer):  # its adapter was not merged
            continue
        weight = layer.weight.detach()
        new: nn.Module
        if isinstance(old, OpaqueBase):
            requantized = old.requantized(weight)
            new, rounded = requantized.module, requantized.weight().float()
        else:
            packed, state = quantize_4bit(weight, old.kind, old.block, old.nested)
            new = Linear4bit(packed, state, None if layer.bias is None else layer.bias.detach())
            rounded = dequantize(of_state(packed, state), torch.float32)
        model.set_submodule(name, new.train(layer.training))
        wide = weight.float()
        errors[name] = float((rounded - wide).norm() / wide.norm().clamp_min(1e-30))  # an all-zero W has error 0
    # layer name -> ‖Q − W‖ / ‖W‖ (Frobenius), with the merged weight W and its quantized values Q
    model.requantization_errors = errors  # type: ignore[assignment]
    if not errors:
        return
    worst = max(errors, key=errors.__getitem__)
    average = sum(errors.values()) / len(errors)
    message = "requantized %d layers: relative error of a weight %.3f on average, %.3f at most (%s)"
    logging.getLogger("lorasb").warning(message, len(errors), average, errors[worst], worst)
