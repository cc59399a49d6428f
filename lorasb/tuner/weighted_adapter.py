"""A new adapter from others with weights: exact where they share A and B, else the best of a rank.

ΔW = Σ_i w_i s_i B_i R_i A_i. With one A and one B this is s·B (Σ_i w_i s_i / s · R_i) A: only R's are added. Otherwise
the factors are stacked, and the sum's truncated SVD, which needs no matrix of W's size, gives the new B, R and A.
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
    """Add the adapter `adapter_name` = Σ weights · adapters to a model; the active adapter stays.

    Args:
        tuner: the `LoRASBModel`.
        adapters: names of initialized adapters.
        weights: one for each, of any sign.
        adapter_name: of the new one.
        kind: "linear" adds R's, exactly, and demands shared A and B; "svd" keeps the best of `rank`; "cat" keeps all
            ranks, exactly; "auto" is "linear" where it can be and else "svd".
        rank: of "svd"; the largest of the adapters' unless given.

    Returns:
        The relative error of ΔW by layer before its A and B are rounded to the base's dtype; zeros where it is exact.

    Raises:
        ValueError: unknown, uninitialized or merged adapters, a name that is taken, other numbers of weights, heads
            that were trained with the adapters, or "linear" over adapters that share no factors.
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
    found = {}
    for name, layer in layers.items():
        parts = [(w, n) for w, n in zip(weights, adapters, strict=True) if n in layer.lorasb_R]
        if shared and kind in ("auto", "linear"):
            found[name] = _added(layer, parts)
        else:
            largest = max(layer.r[n] for _, n in parts)
            found[name] = _truncated(layer, parts, None if kind == "cat" else rank or largest)
    _check_ranks(found)
    _insert(tuner, adapters[0], adapter_name, layers, found)
    worst = max(found.values(), key=lambda one: one.error)
    logging.getLogger("lorasb").info(
        "adapter %r: %d layers combined, largest relative error of their updates %.2e",
        adapter_name,
        len(found),
        worst.error,
    )
    return {name: one.error for name, one in found.items()}


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
        found = layers_with(tuner.model, name)
        if not found:
            raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(tuner.peft_config)}")
        if tuner.peft_config[name].modules_to_save:
            raise ValueError(f"adapter {name!r} has trained whole modules, which cannot be added: modules_to_save")
        for place, layer in found.items():
            if not layer.is_initialized(name):
                raise ValueError(f"adapter {name!r} has not been initialized ({place}): call lorasb.initialize first")
        layers |= found
    return layers


def _check_ranks(found: dict[str, Combined]) -> None:
    for name, one in found.items():
        if len(one.core) > MAX_RANK:
            raise ValueError(
                f"the sum has rank {len(one.core)} in layer {name!r}, more than {MAX_RANK}: use "
                f'combination_type="svd" with svd_rank={MAX_RANK} or less'
            )


def _share_factors(layers: dict[str, LoRASBLinear], adapters: Sequence[str]) -> bool:
    """Whether all have the same A and B, bit by bit, in every layer."""
    for layer in layers.values():
        if any(name not in layer.lorasb_R for name in adapters):
            return False
        for factors in (layer.lorasb_A, layer.lorasb_B):
            if not all(torch.equal(factors[adapters[0]], factors[name]) for name in adapters[1:]):
                return False
    return True


def _added(layer: LoRASBLinear, parts: list[tuple[float, str]]) -> Combined:
    first = parts[0][1]
    total = sum(weight * layer.scaling[name] * layer.lorasb_R[name].double() for weight, name in parts)
    return Combined(layer.lorasb_B[first], cast(Tensor, total), layer.lorasb_A[first], 0.0)


def _truncated(layer: LoRASBLinear, parts: list[tuple[float, str]], rank: int | None) -> Combined:
    """The SVD of Σ w s B R A through QR of the stacked factors, in fp64."""
    b = torch.cat([layer.lorasb_B[name].double() for _, name in parts], 1)
    a = torch.cat([layer.lorasb_A[name].double() for _, name in parts], 0)
    cores = [weight * layer.scaling[name] * layer.lorasb_R[name].double() for weight, name in parts]
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    u, s, vt = torch.linalg.svd(upper @ torch.block_diag(*cores) @ lower.t())
    kept = min(len(s), rank or len(s))
    error = float(s[kept:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Combined(left @ u[:, :kept], torch.diag(s[:kept]), vt[:kept] @ right.t(), error)


def _insert(
    tuner: Any, like: str, adapter_name: str, layers: dict[str, LoRASBLinear], found: dict[str, Combined]
) -> None:
    config = copy.deepcopy(tuner.peft_config[like]).weights_follow()
    config.__dict__.pop("_asked", None)  # what is set here is what is asked for
    ranks = {name: one.core.shape[0] for name, one in found.items()}
    config.r = max(ranks.values())
    config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    config.target_modules, config.inference_mode = set(layers), True
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    active = list(tuner.active_adapters)
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        for name, one in found.items():
            layer = layers[name]
            layer.set_factors(adapter_name, one.b, one.core / layer.scaling[adapter_name], one.a)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        for layer in layers.values():
            if adapter_name in layer.lorasb_R:
                layer.delete_adapter(adapter_name)
        raise
    tuner.set_adapter(active)
