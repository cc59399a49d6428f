"""A run that is planned, and its model without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...utils.precision import native
from ..bundled_model import resolve_model
from .gpus import Card


@dataclass(frozen=True)
class Request:
    """A run that is planned.

    Attributes:
        model: folder or hub id; its config alone is read.
        r: rank; None for the library's default.
        batch, seq: rows of a step that are computed at once, and tokens of each.
        bits: 16, or 4 for a base in NF4 with nested scales.
        checkpointing: whether activations are computed again in backward.
        card: None for this machine's memory.
    """

    model: str
    r: int | None = None
    batch: int = 4
    seq: int = 512
    bits: int = 16
    checkpointing: bool = False
    card: Card | None = None


def patched(request: Request, dtype: torch.dtype | None = None) -> Any:
    """The patched model on the meta device."""
    import lorasb

    model = _on_meta(request.model, dtype or dtype_of(request))
    try:
        return lorasb.patch(model, r=request.r)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{request.model} cannot be patched: {error}") from None


def dtype_of(request: Request) -> torch.dtype:
    """What `--dtype auto` takes there."""
    if request.card is not None:
        return torch.bfloat16 if request.card.bf16 else torch.float32
    return native("cpu").dtype


def _on_meta(name: str, dtype: torch.dtype) -> nn.Module:
    """A model without memory, of the class that its checkpoint names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(name))
    except Exception as error:  # what a config may hold that transformers refuses has types of its own
        first = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"cannot read the config of {name!r}, expected a folder or hub id: {first}") from None
    named = [getattr(transformers, one, None) for one in config.architectures or ()]
    kind = next((one for one in named if one is not None), None)
    try:
        with torch.device("meta"):
            make = kind._from_config if kind is not None else transformers.AutoModelForCausalLM.from_config
            model: nn.Module = make(config, dtype=dtype)
    except Exception as error:  # likewise
        kind_of_error = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{name}: no language model can be made of a {config.model_type} config: {kind_of_error}"
        ) from None
    return model
