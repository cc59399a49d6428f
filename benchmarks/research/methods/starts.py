"""Other starts for LoRA-SB's factors, for the paper's ablations: each rewrites what `lorasb.initialize` left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorasb
from lorasb.constants import PEFT_PREFIX
from lorasb.functional import dequantize
from lorasb.init.cache import read
from lorasb.init.svd import truncated_svd
from lorasb.layers.linear import LoRASBLinear

ADAPTER = "default"


def layers(model: Any) -> dict[str, LoRASBLinear]:
    """Adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRASBLinear)}


def factors(layer: LoRASBLinear) -> tuple[Tensor, Tensor, Tensor]:
    """B, R and A."""
    return tuple(getattr(layer, f"lorasb_{name}")[ADAPTER].detach() for name in "BRA")


def scaled(model: Any, factor: float) -> None:
    """Multiply η by `factor`: R is linear in η, and B and A do not depend on it."""
    for layer in layers(model).values():
        b, core, a = factors(layer)
        layer.set_factors(ADAPTER, b, core * factor, a)


def skewed(model: Any) -> None:
    """The same first step with B = U Σ and R = I, so that BᵀB is no identity (Eq. 11-12, Figure 3)."""
    for layer in layers(model).values():
        b, core, a = factors(layer)
        layer.set_factors(ADAPTER, b.float() @ core.float(), torch.eye(len(core)), a)


def rotated(model: Any) -> None:
    """Write the same subspaces and first step in random bases: B Q, QᵀRPᵀ and P A. AdamW is not invariant to this.

    In the basis of its singular vectors a gradient is diagonal, and AdamW steps as far in the r² − r other entries.
    """
    for i, layer in enumerate(layers(model).values()):
        b, core, a = (factor.float() for factor in factors(layer))
        draw = torch.Generator().manual_seed(i)
        left, right = (torch.linalg.qr(torch.randn(core.shape, generator=draw)).Q for _ in range(2))
        layer.set_factors(ADAPTER, b @ left, left.t() @ core @ right.t(), right @ a)


def flat(model: Any) -> None:
    """B's columns at length one: LoRA-XS with B = U in place of U Σ."""
    for layer in layers(model).values():
        b, core, a = factors(layer)
        layer.set_factors(ADAPTER, torch.nn.functional.normalize(b.float(), dim=0), core, a)


def unit(model: Any) -> None:
    """Scale LoRA-XS's A = Σ Vᵀ so that Σ has root mean square 1 and a rate means the same in every layer; set R = 0."""
    for layer in layers(model).values():
        b, core, a = (factor.float() for factor in factors(layer))
        layer.set_factors(ADAPTER, b, torch.zeros_like(core), a / a.square().sum(1).mean().sqrt())


def noised(model: Any, cache: Path, eta: float, sigma: float, seed: int) -> None:
    """Truncated SVD of ΔW + N(0, σ²) instead of ΔW (Table 5), from the signs in `cache`."""
    signs, _, _ = read(cache)
    draw = torch.Generator().manual_seed(seed)
    for name, layer in layers(model).items():
        step = signs[_key(signs, name)].bits.unpack() * -eta
        step += sigma * torch.randn(step.shape, generator=draw)
        u, s, vt = truncated_svd(step, layer.r[ADAPTER], seed)
        layer.set_factors(ADAPTER, u, torch.diag(s / layer.scaling[ADAPTER]), vt)


def _key(signs: dict[str, Any], name: str) -> str:
    return next(key for key in signs if name == key or name.endswith("." + key))


STARTS = {"skewed": skewed, "flat": flat, "unit": unit, "rotated": rotated}


def change(model: Any, options: dict[str, Any], eta: float, seed: int, cache: Path | None) -> None:
    """Change the factors after the initialization, as a cell's options require."""
    if cache is not None:
        noised(model, cache, eta, options["noise"], seed)
    if "eta" in options:
        scaled(model, options["eta"])
    for name, start in STARTS.items():
        if options.get(name):
            start(model)


@torch.no_grad()
def corrected(model: Any, errors: dict[str, Tensor]) -> None:
    """Add Bᵀ(W − Q)Aᵀ/s to R: the best correction of W's 4-bit rounding error within the subspaces."""
    for name, layer in layers(model).items():
        b, core, a = (factor.float() for factor in factors(layer))
        error = errors[name.removeprefix(PEFT_PREFIX)].float()
        layer.set_factors(ADAPTER, b, core + b.t() @ error @ a.t() / layer.scaling[ADAPTER], a)


@torch.no_grad()
def quantized(model: Any, names: Any) -> dict[str, Tensor]:
    """Quantize the model's linears to NF4, in place; return W − Q, by name, of those ending in `names`."""
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    lorasb.quantize(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, lorasb.Linear4bit)}
    return {n: weights[n].float() - dequantize(m.quantized()).float() for n, m in linears.items() if n.endswith(names)}
