"""Layers that the 4-bit comparisons time: bitsandbytes', ours, and any layer with PEFT's LoRA."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.common.timing import Stats, measured_dtype

FEATURES, RANK, PEFT_RANK = 4096, 96, 32


def packed(dense: nn.Linear) -> Any:
    """bitsandbytes' NF4 layer with the same weight."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=measured_dtype(),
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), quant_type="nf4", compress_statistics=False)
    return layer.to("cpu")


def ours(base: nn.Module, r: int = RANK) -> Any:
    """Our layer over a base, with orthonormal A and B and a small R, as after an initialization."""
    from lorasb.layers.linear import LoRASBLinear

    layer = LoRASBLinear(base, "default", r)
    left = torch.linalg.qr(torch.randn(layer.out_features, r)).Q
    right = torch.linalg.qr(torch.randn(layer.in_features, r)).Q
    layer.set_factors("default", left, torch.randn(r, r) * 0.05, right.t())
    return layer


def with_peft(model: nn.Module, **options: Any) -> Any:
    """Add PEFT's LoRA to every linear of a module."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=PEFT_RANK, lora_alpha=PEFT_RANK, target_modules=r".*", **options)
    return inject_adapter_in_model(config, model)


def row(name: str, case: str, stats: dict[str, Stats]) -> dict[str, Any]:
    """One measured case: milliseconds of every way, and their ratios to the first."""
    return {"row": name, "case": case, "ways": {way: asdict(found) for way, found in stats.items()}}
