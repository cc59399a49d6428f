"""`lorasb.quantize`: replaces a model's linears by `Linear4bit`, bit-equal to bitsandbytes and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..quantization.quant_state import STORAGE_DTYPES, view_as_storage
from ..quantization.quantized_weight import BLOCKS, KINDS
from ..quantization.quantizer import quantize_4bit
from ..utils.dtypes import QUANTIZABLE
from .linear4bit import Linear4bit

LEFT_OUT = ("lm_head",)  # bitsandbytes' integration in transformers leaves the output head in 16 bits as well


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

    The storage equals bitsandbytes' bit for bit, and bitsandbytes loads the files. Output embeddings stay dense.

    Args:
        model: with `nn.Linear` layers in fp32, bf16 or fp16.
        kind: "nf4" or "fp4".
        blocksize: number of elements that share a scale: 32, 64, 128, ... 4096.
        nested: quantize the scales too ("double quantization"), which saves 0.4 bits per weight.
        compute_dtype: dtype of the matrix products; x's dtype if None.
        storage: dtype that the packed bytes are viewed as (bitsandbytes' `quant_storage`); FSDP2 needs the model's.
        exclude: full names, or last components of names, of layers to leave dense.

    Returns:
        The model.

    Raises:
        ValueError: an unknown kind or block size, no linear to quantize, or a weight that is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if blocksize not in BLOCKS:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKS))}, got {blocksize!r}")
    if storage not in STORAGE_DTYPES:
        raise ValueError(f"storage must be one of {', '.join(map(str, STORAGE_DTYPES))}, got {storage}")
    targets = list(_targets(model, set(exclude)))
    if not targets:
        raise ValueError("found no linear layer to quantize: expected nn.Linear in fp32, bf16 or fp16")
    for _, _, name, layer in targets:  # all weights before the first replacement
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {name!r} has NaN or Inf values: nothing was quantized")
    for parent, child, _, layer in targets:
        packed, state = quantize_4bit(layer.weight.detach(), kind, blocksize, nested)
        bias = None if layer.bias is None else layer.bias.detach()
        new = Linear4bit(view_as_storage(packed, storage), state, bias, compute_dtype)
        new.train(layer.training)
        setattr(parent, child, new)
    return model


def _targets(model: nn.Module, exclude: set[str]) -> Iterable[tuple[nn.Module, str, str, nn.Linear]]:
    """(parent, child name, full name, layer) of each plain linear that is neither excluded nor the output head."""
    get_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    for name, parent in model.named_modules():
        for child, layer in parent.named_children():
            full = f"{name}.{child}" if name else child
            # Subclasses have forwards of their own, and a weight on meta has no values to quantize.
            plain = type(layer) is nn.Linear and layer.weight.dtype in QUANTIZABLE and not layer.weight.is_meta
            if plain and layer is not head and not {full, child} & exclude:
                yield parent, child, full, layer
