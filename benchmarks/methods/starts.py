"""Other starts for LoRA-SB's factors, for the paper's ablations: each rewrites what `lorasb.initialize` left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasb.init.cache import read
from lorasb.init.svd import truncated_svd
from lorasb.linear import LoRASBLinear

ADAPTER = "default"


def layers(model: Any) -> dict[str, LoRASBLinear]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRASBLinear)}


@torch.no_grad()
def write(layer: LoRASBLinear, b: Tensor | None = None, core: Tensor | None = None, a: Tensor | None = None) -> None:
    """Put factors into a layer, each in the dtype it has there."""
    for name, value in (("lorasb_B", b), ("lorasb_R", core), ("lorasb_A", a)):
        if value is not None:
            getattr(layer, name)[ADAPTER].copy_(value)


def scaled(model: Any, factor: float) -> None:
    """η times `factor`: R is linear in it, and B and A do not depend on it."""
    for layer in layers(model).values():
        write(layer, core=layer.lorasb_R[ADAPTER].detach() * factor)


def skewed(model: Any) -> None:
    """The same first step with B = U Σ and R = I, so that BᵀB is no identity (Eq. 11-12, Figure 3)."""
    for layer in layers(model).values():
        b, core = layer.lorasb_B[ADAPTER].detach(), layer.lorasb_R[ADAPTER].detach()
        write(layer, b=b.float() @ core, core=torch.eye(len(core)))


def noised(model: Any, cache: Path, eta: float, sigma: float, seed: int) -> None:
    """Truncated SVD of ΔW + N(0, σ²) instead of ΔW (Table 5), from the signs in `cache`."""
    signs, _, _ = read(cache)
    draw = torch.Generator().manual_seed(seed)
    for name, layer in layers(model).items():
        step = signs[_key(signs, name)].signs().unpack() * -eta
        step += sigma * torch.randn(step.shape, generator=draw)
        u, s, vt = truncated_svd(step, layer.r[ADAPTER], seed)
        write(layer, u, torch.diag(s / layer.scaling[ADAPTER]), vt)


def _key(signs: dict[str, Any], name: str) -> str:
    return next(key for key in signs if name == key or name.endswith("." + key))


def change(model: Any, options: dict[str, Any], eta: float, seed: int, cache: Path | None) -> None:
    """What a cell's options ask of the factors, after the initialisation."""
    if cache is not None:
        noised(model, cache, eta, options["noise"], seed)
    if "eta" in options:
        scaled(model, options["eta"])
    if options.get("skewed"):
        skewed(model)
