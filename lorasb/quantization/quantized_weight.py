"""`QuantizedWeight`: the storage of a quantized layer, read from bitsandbytes' modules or our own and checked.

`QuantState` has the statistics of a 4-bit weight, with bitsandbytes' attribute names and state-dict format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..compat.bitsandbytes import unpack_repacked
from ..utils.precision import QUANTIZABLE
from ..utils.reading import Json

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # block sizes that bitsandbytes has
KINDS = ("nf4", "fp4")
ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes in the ops' `layout`
DEVICES = ("cpu", "cuda", "meta")
KEY = "quant_state.bitsandbytes__"  # start of the JSON entry's key in a state dict; "nf4" or "fp4" follows


@dataclass
class QuantState:
    """Statistics of a packed 4-bit weight; attributes are named as in bitsandbytes."""

    absmax: Tensor  # scale of each block [blocks], fp32; with nested statistics uint8 codes, which `state2` decodes
    code: Tensor  # [16], the values that the nibbles stand for
    blocksize: int  # number of elements that share a scale
    quant_type: str | None = None  # "nf4" or "fp4"; None for `state2`
    shape: torch.Size | None = None  # W's shape; dtype, too, is W's
    dtype: torch.dtype = torch.float32
    offset: Tensor | None = None  # mean of the scales, subtracted before they were quantized
    state2: QuantState | None = None  # statistics of the quantized scales

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    def to(self, device: torch.device | str) -> QuantState:
        """A copy on another device."""
        held = {name: getattr(self, name) for name in ("absmax", "code", "offset", "state2")}
        return replace(self, **{name: value.to(device) for name, value in held.items() if value is not None})

    def as_tensors(self) -> dict[str, Tensor]:
        """The entries of a state dict as bitsandbytes writes them: tensors, and metadata as JSON in uint8."""
        metadata: Json = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        metadata |= {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape or ())}
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        if self.state2 is not None and self.offset is not None:
            # A copy of the table, which is cached and shared by all layers: safetensors refuses shared memory.
            tensors |= {"nested_absmax": self.state2.absmax, "nested_quant_map": self.state2.code.clone()}
            nested_dtype = str(self.state2.dtype).removeprefix("torch.")
            metadata |= {"nested_blocksize": self.state2.blocksize, "nested_dtype": nested_dtype}
            metadata["nested_offset"] = self.offset.item()
        encoded = json.dumps(metadata).encode()
        return tensors | {f"{KEY}{self.quant_type}": torch.tensor(list(encoded), dtype=torch.uint8)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> QuantState:
        """The state from a state dict's entries without the weight's prefix; a ValueError if some are missing."""
        keys = [key for key in tensors if key.startswith(KEY)]
        if len(keys) != 1 or not {"absmax", "quant_map"} <= set(tensors):
            raise ValueError(f"expected absmax, quant_map and {KEY}nf4 of a 4-bit weight, got {sorted(tensors)}")
        metadata = json.loads(bytes(tensors[keys[0]].cpu().tolist()).decode())
        offset, state2 = None, None
        if "nested_absmax" in tensors:
            offset = torch.tensor(float(metadata["nested_offset"]), dtype=torch.float32, device="cpu")
            state2 = cls(tensors["nested_absmax"], tensors["nested_quant_map"], metadata["nested_blocksize"])
        absmax, code = tensors["absmax"], tensors["quant_map"]
        shape, dtype = torch.Size(metadata["shape"]), getattr(torch, metadata["dtype"])
        return cls(absmax, code, metadata["blocksize"], metadata["quant_type"], shape, dtype, offset, state2)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """W [out, in] in 4 or 8 bits.

    4 bits: two nibbles per byte, high nibble first, over W flattened by rows; with i the flat index,
    `W[i] = table[nibble[i]]·absmax[i // block]`, computed in fp32 and rounded to W's dtype (not rounded on a CPU for
    up to 8 tokens in fp32, which is more exact). With nested statistics, `absmax = table2[absmax8]·absmax2 + offset`. 8
    bits: `W = codes·scale[row] / 127`.
    """

    # 8 bits: codes [out, in], int8, and row scales [out], fp32. 4 bits: packed bytes [ceil(out·in / 2)], uint8, scales
    # [blocks], fp32, and the table [16], fp32. With nested statistics, whose scales are uint8, also the scales' scales,
    # their table and the offset.
    tensors: list[Tensor]
    shape: tuple[int, int]  # (out, in)
    dtype: torch.dtype  # of W before quantization, and after dequantization
    kind: str  # "nf4", "fp4" or "int8"
    block: int = 0  # number of elements that share a scale; 0 for int8, which has one per row
    block2: int = 256  # number of blocks that share a nested scale

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nested(self) -> bool:
        """True if the scales are quantized themselves (double quantization)."""
        return len(self.tensors) == 6

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def layout(self, dtype: torch.dtype | None = None) -> list[int]:
        """[block, block2, rounding] for a product in `dtype`; None: for `serve_quantized`, which always rounds."""
        # bitsandbytes dequantizes to W's own dtype and casts from there; W is computed in fp32 here
        return [self.block, self.block2, 0 if self.dtype == dtype else ROUNDING.get(self.dtype, 0)]


def of_module(module: nn.Module) -> QuantizedWeight:
    """The storage of a linear that `is_quantized`, unpacked in place if repacked."""
    weight = cast(Tensor, module._parameters["weight"])
    if type(module).__name__ == "Linear8bitLt":
        return _int8_weight(module, weight)
    # Modules hold the state as well: a parameter that FSDP or a conversion has replaced loses its attributes.
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise ValueError("this 4-bit layer has not been quantized yet: move it to its device, model.to('cpu')")
    return of_state(weight, state)


def of_weight(weight: Tensor | QuantizedWeight | None) -> QuantizedWeight | None:
    """The storage of a 4-bit parameter with a `quant_state`; a `QuantizedWeight` as it is; None for a dense tensor."""
    if isinstance(weight, QuantizedWeight) or weight is None:
        return weight
    state = getattr(weight, "quant_state", None)
    return None if state is None else of_state(weight, state)


def of_state(packed: Tensor, state: QuantState) -> QuantizedWeight:
    """The storage from a packed tensor and bitsandbytes' QuantState, or ours; a ValueError if they do not match."""
    if getattr(state, "packing_format_for_cpu", False):
        unpack_repacked(packed, state)
    shape = tuple(int(size) for size in state.shape or ())
    # A plain tensor instead of bitsandbytes' Params4bit: the direct calls on the CPU take no subclasses.
    octets = packed.detach().as_subclass(Tensor).contiguous()
    octets = (octets if octets.dtype == torch.uint8 else octets.view(torch.uint8)).reshape(-1)
    if packed.is_floating_point():  # bytes viewed as a wider dtype are padded to a multiple of its size
        octets = octets[: -(-math.prod(shape) // 2)]
    tensors = [octets, state.absmax.reshape(-1), state.code]
    block2 = 256
    if state.state2 is not None:
        offset = torch.as_tensor(state.offset, dtype=torch.float32, device=octets.device).reshape(1)
        tensors += [state.state2.absmax.reshape(-1), state.state2.code, offset]
        block2 = int(state.state2.blocksize)
    _check(tensors, shape, state, block2)
    tensors, block = [tensor.contiguous() for tensor in tensors], int(state.blocksize)
    return QuantizedWeight(tensors, (shape[0], shape[1]), state.dtype, str(state.quant_type), block, block2)


def _check(tensors: list[Tensor], shape: tuple[int, ...], state: QuantState, block2: int) -> None:
    if state.quant_type not in KINDS:
        raise ValueError(f"expected a 4-bit weight of type {' or '.join(KINDS)}, got {state.quant_type!r}")
    if state.blocksize not in BLOCKS:
        raise ValueError(f"expected a block size of {', '.join(map(str, BLOCKS))}, got {state.blocksize!r}")
    if len(shape) != 2 or state.dtype not in QUANTIZABLE:
        raise ValueError(f"expected a weight [out, in] in fp32, bf16 or fp16, got {list(shape)} in {state.dtype}")
    if tensors[0].device.type not in DEVICES:
        raise ValueError(f"4-bit weights run on a CPU or a CUDA GPU, got one on {tensors[0].device}: model.to('cpu')")
    names = ("bytes", "scales", "table entries", "nested scales", "nested table entries", "offsets")
    count = math.prod(shape)
    blocks = -(-count // state.blocksize)  # blocks run over the flattened W, across the ends of rows
    lengths = [-(-count // 2), blocks, 16, -(-blocks // block2), 256, 1]
    for tensor, length, name in zip(tensors, lengths, names, strict=False):  # 3 tensors, or 6 if nested
        if tensor.numel() != length:
            raise ValueError(
                f"expected {length} {name} for a weight {list(shape)} in blocks of {state.blocksize}, got "
                f"{tensor.numel()}: the packed weight and its quant_state do not belong together, load the model again"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"the weight is on {tensors[0].device}, its statistics on {tensor.device}: model.to(...)")
        has_values = tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0
        # aminmax propagates NaN, so one pass without a mask is enough
        if has_values and not all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist())):
            raise ValueError(f"the quantized weight's {name} hold NaN or Inf: its file is damaged")


def _int8_weight(module: nn.Module, weight: Tensor) -> QuantizedWeight:
    """The storage of a `Linear8bitLt`: int8 codes, and row scales `SCB`."""
    if weight.dtype != torch.int8:
        raise TypeError(
            "this Linear8bitLt holds 16-bit weights: quantize it first, by has_fp16_weights=False and model.to(device)"
        )
    scales = getattr(weight, "SCB", None)  # bitsandbytes moves it to the module's state in the first forward
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if scales is None or scales.numel() != weight.shape[0]:
        count = "none" if scales is None else scales.numel()
        raise ValueError(f"expected {len(weight)} row scales (SCB) of 8 bits, got {count}: load the model again")
    if not scales.is_meta and not torch.isfinite(scales).all():
        raise ValueError("the row scales (SCB) of an 8-bit weight hold NaN or Inf: its file is damaged")
    codes = weight.detach().as_subclass(Tensor).contiguous()
    # 8-bit storage does not record W's dtype; bitsandbytes multiplies in fp16.
    dtype = module.bias.dtype if isinstance(module.bias, Tensor) else torch.float16
    tensors = [codes, scales.detach().float().reshape(-1).to(codes.device)]
    return QuantizedWeight(tensors, (codes.shape[0], codes.shape[1]), dtype, "int8")


def is_quantized(module: nn.Module) -> bool:
    """True if a linear layer is quantized to 4 or 8 bits; its storage is not checked."""
    weight = module._parameters.get("weight")
    is_8bit = type(module).__name__ == "Linear8bitLt"
    return weight is not None and (hasattr(weight, "quant_state") or hasattr(module, "quant_state") or is_8bit)
