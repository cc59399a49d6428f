"""`QuantState`: the statistics of a packed weight under the names that bitsandbytes gives them, and its file format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BYTES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)  # what packed bytes may be seen as
KEY = "quant_state.bitsandbytes__"


@dataclass
class QuantState:
    """Statistics of a packed weight, with the names that bitsandbytes gives them.

    Attributes:
        absmax: scale of each block [blocks]: fp32, or uint8 where `state2` has scales of scales.
        code: the table [16].
        shape, dtype: of the weight before.
        offset: what nested scales are relative to.
    """

    absmax: Tensor
    code: Tensor
    blocksize: int
    quant_type: str | None = None
    shape: torch.Size | None = None
    dtype: torch.dtype = torch.float32
    offset: Tensor | None = None
    state2: QuantState | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self.state2 is not None

    def to(self, device: torch.device | str) -> QuantState:
        """The same on another device."""
        offset = None if self.offset is None else self.offset.to(device)
        state2 = None if self.state2 is None else self.state2.to(device)
        absmax, code = self.absmax.to(device), self.code.to(device)
        return QuantState(absmax, code, self.blocksize, self.quant_type, self.shape, self.dtype, offset, state2)

    def as_tensors(self) -> dict[str, Tensor]:
        """As bitsandbytes writes them into a state dict."""
        facts: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        facts |= {"dtype": _name(self.dtype), "shape": list(self.shape or ())}
        found = {"absmax": self.absmax, "quant_map": self.code}
        if self.state2 is not None and self.offset is not None:
            found |= {"nested_absmax": self.state2.absmax, "nested_quant_map": self.state2.code.clone()}
            facts |= {"nested_blocksize": self.state2.blocksize, "nested_dtype": _name(self.state2.dtype)}
            facts["nested_offset"] = self.offset.item()
        octets = json.dumps(facts).encode()
        return found | {f"{KEY}{self.quant_type}": torch.tensor(list(octets), dtype=torch.uint8)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> QuantState:
        """From what a state dict has.

        Raises:
            ValueError: tensors are missing.
        """
        keys = [key for key in tensors if key.startswith(KEY)]
        if len(keys) != 1 or not {"absmax", "quant_map"} <= set(tensors):
            raise ValueError(f"expected absmax, quant_map and {KEY}nf4 of a 4-bit weight, got {sorted(tensors)}")
        facts = json.loads(bytes(tensors[keys[0]].cpu().tolist()).decode())
        offset, state2 = None, None
        if "nested_absmax" in tensors:
            offset = torch.tensor(float(facts["nested_offset"]))
            state2 = cls(tensors["nested_absmax"], tensors["nested_quant_map"], facts["nested_blocksize"])
        shape, dtype = torch.Size(facts["shape"]), getattr(torch, facts["dtype"])
        return cls(
            tensors["absmax"],
            tensors["quant_map"],
            facts["blocksize"],
            facts["quant_type"],
            shape,
            dtype,
            offset,
            state2,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seen_as(packed: Tensor, storage: torch.dtype) -> Tensor:
    """Packed bytes [n, 1] under another dtype, padded to whole numbers of it."""
    octets = packed.reshape(-1).view(torch.uint8)
    octets = nn.functional.pad(octets, (0, -len(octets) % storage.itemsize))
    return octets.view(storage)[:, None]
