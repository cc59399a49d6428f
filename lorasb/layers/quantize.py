"""`lorasb.quantize`: a plain model's linears in 4 bits, without bitsandbytes and to the bit as it quantizes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..quantization.quant_state import BYTES, seen_as
from ..quantization.quantized_weight import BLOCKS, KINDS
from ..quantization.quantizer import quantize_4bit
from ..utils.dtypes import QUANTIZABLE
from .linear4bit import Linear4bit

LEFT_OUT = ("lm_head",)


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
    """Replace a model's linears by `Linear4bit`, in place; the model is left as it was if anything is wrong.

    The storage is bitsandbytes' own, bit for bit, and its files load there. Output embeddings are left alone.

    Args:
        model: with `nn.Linear` layers in fp32, bf16 or fp16.
        kind: "nf4" or "fp4".
        blocksize: elements that share a scale: 32, 64, 128, ... 4096.
        nested: quantize the scales too ("double quantization"): 0.4 bits a weight less.
        compute_dtype: what products are taken in; x's unless given.
        storage: dtype that the packed bytes are seen as, bitsandbytes' `quant_storage`: FSDP2 asks for the model's own.
        exclude: names, or last parts of names, of layers to leave alone.

    Returns:
        The model.

    Raises:
        ValueError: an unknown kind or block size, no linear to quantize, or a weight that is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if blocksize not in BLOCKS:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKS))}, got {blocksize!r}")
    if storage not in BYTES:
        raise ValueError(f"storage must be one of {', '.join(map(str, BYTES))}, got {storage}")
    targets = list(_targets(model, set(exclude)))
    if not targets:
        raise ValueError("found no linear layer to quantize: expected nn.Linear in fp32, bf16 or fp16")
    for _, _, name, layer in targets:
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {name!r} has NaN or Inf values: nothing was quantized")
    for parent, child, _, layer in targets:
        packed, state = quantize_4bit(layer.weight.detach(), kind, blocksize, nested)
        new = Linear4bit(
            seen_as(packed, storage), state, None if layer.bias is None else layer.bias.detach(), compute_dtype
        )
        new.train(layer.training)
        setattr(parent, child, new)
    return model


def _targets(model: nn.Module, exclude: set[str]) -> Iterable[tuple[nn.Module, str, str, nn.Linear]]:
    heads: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = heads()
    for name, parent in model.named_modules():
        for child, layer in parent.named_children():
            full = f"{name}.{child}" if name else child
            plain = type(layer) is nn.Linear and layer.weight.dtype in QUANTIZABLE and not layer.weight.is_meta
            if plain and layer is not head and not {full, child} & exclude:
                yield parent, child, full, layer
