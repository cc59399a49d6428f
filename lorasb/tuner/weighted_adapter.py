"""Weighted sum of adapters as a new adapter: exact if they share A and B, else the best approximation of a rank.

ΔW = Σ_i w_i s_i B_i R_i A_i. With shared A and B this is s·B (Σ_i w_i s_i / s · R_i) A, so only the R's are added.
Otherwise the factors are stacked, and the truncated SVD of the sum, computed without a matrix of W's size, gives the
new B, R and A.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..constants import MAX_RANK
from ..layers.linear import LoRASBLinear
from ..layers.lookup import any_merged, layers_with

KINDS = ("auto", "linear", "svd", "cat")


@dataclass(frozen=True)
class Combined:
    """One layer's new factors, B [out, r], R [r, r] without s, A [r, in], and ‖ΔW − s·B R A‖ / ‖ΔW‖."""

    b: Tensor
    core: Tensor
    a: Tensor
    error: float


@torch.no_grad()
def combine(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, kind: str, rank: int | None
) -> dict[str, float]:
    """Add the adapter `adapter_name` = Σ weights · adapters to a model; the active adapter stays active.

    Args:
        tuner: the `LoRASBModel`.
        adapters: names of initialized adapters.
        weights: one per adapter, of any sign.
        adapter_name: name of the new adapter.
        kind: "linear" adds R's, exactly, and requires shared A and B; "svd" gives the best approximation of `rank`;
            "cat" is exact, at the sum of the ranks; "auto" is "linear" for shared A and B, else "svd".
        rank: for "svd"; the largest of the adapters' ranks by default.

    Returns:
        The relative error of ΔW by layer, before A and B are rounded to the base's dtype; 0 where it is exact.

    Raises:
        ValueError: unknown, uninitialized or merged adapters, a name in use, a wrong number of weights, heads that
            were trained with the adapters, or "linear" for adapters that do not share A and B.
    """
    layers = _check(tuner, adapters, weights, adapter_name, kind)
    if rank is not None and rank < 1:
        raise ValueError(f"svd_rank must be positive, got {rank}")
    shared = _share_factors(layers, adapters)
    if kind == "linear" and not shared:
        raise ValueError(
            f"adapters {', '.join(adapters)} do not share A and B, so adding their R's means nothing: use "
            'combination_type="svd" for the best adapter of one rank, or "cat" for an exact one of a higher rank'
        )
    combined = {}
    for name, layer in layers.items():
        weighted_names = [(w, n) for w, n in zip(weights, adapters, strict=True) if n in layer.lorasb_R]
        if shared and kind in ("auto", "linear"):
            combined[name] = _sum_cores(layer, weighted_names)
        else:
            largest = max(layer.r[n] for _, n in weighted_names)
            combined[name] = _truncated_svd(layer, weighted_names, None if kind == "cat" else rank or largest)
    _check_ranks(combined)
    _insert(tuner, adapters[0], adapter_name, layers, combined)
    worst = max(combined.values(), key=lambda layer_result: layer_result.error)
    logging.getLogger("lorasb").info(
        "adapter %r: %d layers combined, largest relative error of their updates %.2e",
        adapter_name,
        len(combined),
        worst.error,
    )
    return {name: layer_result.error for name, layer_result in combined.items()}


def _check(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, kind: str
) -> dict[str, LoRASBLinear]:
    if kind not in KINDS:
        raise ValueError(f"combination_type must be one of {', '.join(KINDS)}, got {kind!r}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected a weight for each adapter, got {len(adapters)} adapters and {len(weights)} weights")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r} already: model.delete_adapter({adapter_name!r})")
    if any_merged(tuner.model):
        raise ValueError("an adapter is merged into the weights: call model.unmerge_adapter() first")
    layers: dict[str, LoRASBLinear] = {}
    for name in adapters:
        layers |= _initialized_layers(tuner, name)
    return layers


def _initialized_layers(tuner: Any, name: str) -> dict[str, LoRASBLinear]:
    """The layers of one adapter, which have to be initialized."""
    layers = layers_with(tuner.model, name)
    if not layers:
        raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(tuner.peft_config)}")
    if tuner.peft_config[name].modules_to_save:
        raise ValueError(f"adapter {name!r} has trained whole modules, which cannot be added: modules_to_save")
    for path, layer in layers.items():
        if not layer.is_initialized(name):
            raise ValueError(f"adapter {name!r} has not been initialized ({path}): call lorasb.initialize first")
    return layers


def _check_ranks(combined: dict[str, Combined]) -> None:
    for name, factors in combined.items():
        if len(factors.core) > MAX_RANK:
            raise ValueError(
                f"the sum has rank {len(factors.core)} in layer {name!r}, more than {MAX_RANK}: use "
                f'combination_type="svd" with svd_rank={MAX_RANK} or less'
            )


def _share_factors(layers: dict[str, LoRASBLinear], adapters: Sequence[str]) -> bool:
    """True if all adapters have bitwise the same A and B in every layer."""
    for layer in layers.values():
        # adapters with different targets cannot be added by R alone
        if any(name not in layer.lorasb_R for name in adapters):
            return False
        for factors in (layer.lorasb_A, layer.lorasb_B):
            if not all(torch.equal(factors[adapters[0]], factors[name]) for name in adapters[1:]):
                return False
    return True


def _sum_cores(layer: LoRASBLinear, weighted_names: list[tuple[float, str]]) -> Combined:
    """Σ w s R over shared A and B, in fp64: exact up to one rounding of R to fp32."""
    first = weighted_names[0][1]
    total = sum(weight * layer.scaling[name] * layer.lorasb_R[name].double() for weight, name in weighted_names)
    return Combined(layer.lorasb_B[first], cast(Tensor, total), layer.lorasb_A[first], 0.0)


def _truncated_svd(layer: LoRASBLinear, weighted_names: list[tuple[float, str]], rank: int | None) -> Combined:
    """The truncated SVD of Σ w s B R A, in fp64.

    QR of the stacked B [out, Σr] and Aᵀ [in, Σr] leaves a core of [Σr, Σr], whose SVD is that of the sum. The new
    factors are orthonormal, as LoRA-SB's own are.
    """
    b = torch.cat([layer.lorasb_B[name].double() for _, name in weighted_names], 1)
    a = torch.cat([layer.lorasb_A[name].double() for _, name in weighted_names], 0)
    cores = [weight * layer.scaling[name] * layer.lorasb_R[name].double() for weight, name in weighted_names]
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    u, s, vt = torch.linalg.svd(upper @ torch.block_diag(*cores) @ lower.t())
    new_rank = min(len(s), rank or len(s))
    # Eckart-Young: the dropped singular values are the error in the Frobenius norm.
    error = float(s[new_rank:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Combined(left @ u[:, :new_rank], torch.diag(s[:new_rank]), vt[:new_rank] @ right.t(), error)


def _insert(
    tuner: Any, template: str, adapter_name: str, layers: dict[str, LoRASBLinear], combined: dict[str, Combined]
) -> None:
    active = list(tuner.active_adapters)  # injection may change which adapters are active
    tuner.peft_config[adapter_name] = _config_like(tuner.peft_config[template], combined)
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        for name, factors in combined.items():
            layer = layers[name]
            # the core includes every s_i; the layer multiplies by its own s again
            layer.set_factors(adapter_name, factors.b, factors.core / layer.scaling[adapter_name], factors.a)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        for layer in layers.values():
            if adapter_name in layer.lorasb_R:
                layer.delete_adapter(adapter_name)
        raise
    tuner.set_adapter(active)


def _config_like(template: Any, combined: dict[str, Combined]) -> Any:
    """A copy of the template's config, for the combined layers and their ranks."""
    config = copy.deepcopy(template).weights_follow()
    config.__dict__.pop("_asked", None)  # or `start_over` would restore the template's ranks and targets
    ranks = {name: factors.core.shape[0] for name, factors in combined.items()}
    config.r = max(ranks.values())
    config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    # Layers are named in full and every rank is set, so the template's selections must not filter them again.
    config.target_modules, config.inference_mode = set(combined), True
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
