"""`QuantState`: the statistics of a 4-bit weight with bitsandbytes' attribute names and state-dict format."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..utils.reading import Json

# dtypes that packed bytes may be viewed as
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
KEY = "quant_state.bitsandbytes__"  # of the JSON entry in a state dict; "nf4" or "fp4" follows


@dataclass
class QuantState:
    """Statistics of a packed 4-bit weight; attributes are named as in bitsandbytes."""

    absmax: Tensor  # scale of each block [blocks], fp32; with nested statistics uint8 codes, which `state2` decodes
    code: Tensor  # [16], the values that the nibbles stand for
    blocksize: int  # number of elements that share a scale
    quant_type: str | None = None  # "nf4" or "fp4"; None for `state2`
    shape: torch.Size | None = None  # of W, as dtype is
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
        metadata |= {"dtype": _name(self.dtype), "shape": list(self.shape or ())}
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        if self.state2 is not None and self.offset is not None:
            # A copy of the table, which is cached and shared by all layers: safetensors refuses shared memory.
            tensors |= {"nested_absmax": self.state2.absmax, "nested_quant_map": self.state2.code.clone()}
            metadata |= {"nested_blocksize": self.state2.blocksize, "nested_dtype": _name(self.state2.dtype)}
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
            offset = torch.tensor(float(metadata["nested_offset"]))
            state2 = cls(tensors["nested_absmax"], tensors["nested_quant_map"], metadata["nested_blocksize"])
        absmax, code = tensors["absmax"], tensors["quant_map"]
        shape, dtype = torch.Size(metadata["shape"]), getattr(torch, metadata["dtype"])
        return cls(absmax, code, metadata["blocksize"], metadata["quant_type"], shape, dtype, offset, state2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def view_as_storage(packed: Tensor, storage: torch.dtype) -> Tensor:
    """Packed bytes [n, 1] viewed as another dtype, zero-padded to a multiple of its size."""
    # bitsandbytes' `quant_storage`: FSDP groups parameters of one dtype only, so packed weights take the model's.
    octets = packed.reshape(-1).view(torch.uint8)
    octets = nn.functional.pad(octets, (0, -len(octets) % storage.itemsize))
    return octets.view(storage)[:, None]
