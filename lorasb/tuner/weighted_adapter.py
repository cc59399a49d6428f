"""Weighted sum of adapters as a new adapter, ΔW = Σ_i w_i s_i B_i R_i A_i: exact if they share A and B, else the best
approximation of a rank.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ..constants import MAX_RANK
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import any_merged, layers_with

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD = "_svd"  # suffix of the kinds that prune updates of W [out, in], not R's
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Pruning:
    """Options of pruning, by PEFT's names: density is the share of entries that stay, in [0, 1]."""

    kind: str
    density: float
    majority_sign_method: str = "total"

    def check(self) -> None:
        """Raise a ValueError for a density or sign method that is out of range."""
        density = self.density
        if not isinstance(density, int | float) or isinstance(density, bool) or not 0.0 <= density <= 1.0:
            raise ValueError(f"{self.kind} takes density in [0, 1], the share of entries that stay, got {density!r}")
        if self.majority_sign_method not in SIGN_METHODS:
            methods = " or ".join(map(repr, SIGN_METHODS))
            raise ValueError(f"majority_sign_method must be {methods}, got {self.majority_sign_method!r}")

    def add(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum of tensors of one shape. DARE draws from torch's global random state."""
        factors, density = torch.tensor(weights, device=tensors[0].device, dtype=tensors[0].dtype), self.density
        if self.kind == "ties":
            return ties(list(tensors), factors, density, self.majority_sign_method)  # type: ignore[arg-type]
        if self.kind == "dare_ties":
            return dare_ties(list(tensors), factors, density, self.majority_sign_method)  # type: ignore[arg-type]
        add = dare_linear if self.kind == "dare_linear" else magnitude_prune
        return add(list(tensors), factors, density)


@dataclass(frozen=True)
class Decomposition:
    """Options of an update's SVD, by PEFT's names; clamp is the quantile that entries of U Σ and Vᵀ are clamped to."""

    clamp: float | None = None
    full_matrices: bool = False
    driver: str | None = None

    def factors(self, update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U Σ [out, r] and Vᵀ [r, in] of an update [out, in]; r is `rank` or less."""
        u, s, vt = torch.linalg.svd(update, full_matrices=self.full_matrices, driver=self.driver)
        rank = min(rank, len(s))
        left, right = u[:, :rank] * s[:rank], vt[:rank]
        if self.clamp is None:
            return left, right
        bound = float(torch.cat((left.flatten(), right.flatten())).double().quantile(self.clamp))
        return left.clamp(-bound, bound), right.clamp(-bound, bound)


def pruned_update(updates: Sequence[Tensor], weights: Sequence[float], pruning: Pruning | None) -> Tensor:
    """Σ weights · updates [out, in], pruned if requested."""
    if pruning is not None:
        return pruning.add(updates, weights)
    factors = torch.tensor(weights, device=updates[0].device, dtype=updates[0].dtype)
    return task_arithmetic(list(updates), factors)


KINDS = ("auto", "linear", "svd", "cat", *PRUNING, *(f"{kind}{SVD}" for kind in PRUNING))


@dataclass(frozen=True)
class SumOptions:
    """Method by which adapters are added; the names are PEFT's."""

    # "linear" adds the R's of adapters that share A and B, exactly; "svd" is the best approximation of rank `svd_rank`;
    # "cat" is exact, at the sum of the ranks; "auto" is "linear" for shared A and B, else "svd"; the others prune
    # first. "linear" and pruning act as their "_svd" forms where A and B are not shared.
    combination_type: str = "auto"
    svd_rank: int | None = None  # the largest of the adapters' ranks by default
    svd_clamp: float | None = None
    svd_full_matrices: bool = False
    svd_driver: str | None = None
    density: float | None = None  # share of entries that stay, for pruning
    majority_sign_method: str = "total"  # how TIES elects a sign: by the sum ("total") or by votes ("frequency")

    def pruning(self) -> Pruning | None:
        """The pruning before the sum, if any; raises a ValueError for an unknown kind, density or method."""
        if self.combination_type not in KINDS:
            raise ValueError(f"combination_type must be one of {', '.join(KINDS)}, got {self.combination_type!r}")
        kind = self.combination_type.removesuffix(SVD)
        if kind not in PRUNING:
            return None
        pruning = Pruning(kind, cast(float, self.density), self.majority_sign_method)
        pruning.check()
        return pruning


@dataclass(frozen=True)
class Combined:
    """One layer's new factors, B [out, r], R [r, r] without s, A [r, in], and ‖ΔW − s·B R A‖ / ‖ΔW‖."""

    b: Tensor
    core: Tensor
    a: Tensor
    error: float


@torch.no_grad()
def combine(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, options: SumOptions
) -> dict[str, float]:
    """Add the adapter `adapter_name` = Σ weights · adapters to a model; see `LoRASBModel.add_weighted_adapter`."""
    pruning = options.pruning()
    layers = _check(tuner, adapters, weights, adapter_name)
    if options.svd_rank is not None and options.svd_rank < 1:
        raise ValueError(f"svd_rank must be positive, got {options.svd_rank}")
    shared = _share_factors(layers, adapters)
    combined = {}
    for name, layer in layers.items():
        weighted_names = [(w, n) for w, n in zip(weights, adapters, strict=True) if n in layer.lorasb_R]
        combined[name] = _combined(layer, weighted_names, options, pruning, shared)
    _check_ranks(combined)
    _insert(tuner, adapters, adapter_name, layers, combined)
    worst = max(combined.values(), key=lambda layer_result: layer_result.error)
    logging.getLogger("lorasb").info(
        "adapter %r: %d layers combined, largest relative error of their updates %.2e",
        adapter_name,
        len(combined),
        worst.error,
    )
    return {name: layer_result.error for name, layer_result in combined.items()}


def _combined(
    layer: AdaptedLayer,
    weighted_names: list[tuple[float, str]],
    options: SumOptions,
    pruning: Pruning | None,
    shared: bool,
) -> Combined:
    kind = options.combination_type
    rank = options.svd_rank or max(layer.adapters[name].r for _, name in weighted_names)
    if shared and not kind.endswith("svd") and kind != "cat":
        return _sum_cores(layer, weighted_names, pruning)
    if pruning is not None or options.svd_clamp is not None:
        decomposition = Decomposition(options.svd_clamp, options.svd_full_matrices, options.svd_driver)
        return _of_update(layer, weighted_names, pruning, decomposition, rank)
    return _truncated_svd(layer, weighted_names, None if kind == "cat" else rank)


def _check(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> dict[str, AdaptedLayer]:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected a weight for each adapter, got {len(adapters)} adapters and {len(weights)} weights")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r} already: model.delete_adapter({adapter_name!r})")
    if any_merged(tuner.model):
        raise ValueError("an adapter is merged into the weights: call model.unmerge_adapter() first")
    layers: dict[str, AdaptedLayer] = {}
    for name in adapters:
        layers |= _initialized_layers(tuner, name)
    with_rows = [name for name in adapters if tuner.peft_config[name].trainable_token_indices]
    if with_rows:
        raise ValueError(
            f"adapter {with_rows[0]!r} has trained rows of an embedding, which cannot be added: trainable_token_indices"
        )
    with_modules = [name for name in dict.fromkeys(adapters) if tuner.peft_config[name].modules_to_save]
    if len(with_modules) > 1:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(with_modules) - 1} such instance(s). Adapters {', '.join(map(repr, with_modules))} have some: at "
            "most one may, and the new one takes them over"
        )
    return layers


def _initialized_layers(tuner: Any, name: str) -> dict[str, AdaptedLayer]:
    layers = layers_with(tuner.model, name)
    if not layers:
        raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(tuner.peft_config)}")
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


def _share_factors(layers: dict[str, AdaptedLayer], adapters: Sequence[str]) -> bool:
    for layer in layers.values():
        # adapters with different targets cannot be added by R alone
        if any(name not in layer.lorasb_R for name in adapters):
            return False
        for factors in (layer.lorasb_A, layer.lorasb_B):
            if not all(torch.equal(factors[adapters[0]], factors[name]) for name in adapters[1:]):
                return False
    return True


def _sum_cores(layer: AdaptedLayer, weighted_names: list[tuple[float, str]], pruning: Pruning | None) -> Combined:
    """Σ w s R over shared A and B, in fp64: exact up to one rounding of R to fp32, if nothing is pruned."""
    weights, names = zip(*weighted_names, strict=True)
    cores = [layer.adapters[name].scaling * layer.lorasb_R[name].double() for name in names]
    return Combined(layer.lorasb_B[names[0]], pruned_update(cores, weights, pruning), layer.lorasb_A[names[0]], 0.0)


def _of_update(
    layer: AdaptedLayer,
    weighted_names: list[tuple[float, str]],
    pruning: Pruning | None,
    decomposition: Decomposition,
    rank: int,
) -> Combined:
    """The best factors of a rank for the layer's update [out, in], in fp32; pruned updates have full rank."""
    weights, names = zip(*weighted_names, strict=True)
    updates = [layer.get_delta_weight(name).float() for name in names]
    update = pruned_update([layer.base.matrix(u) for u in updates], weights, pruning)
    left, right = decomposition.factors(update, rank)
    error = float((update - left @ right).norm() / update.norm().clamp_min(1e-30))
    b, upper = torch.linalg.qr(left.double())  # orthonormal, as LoRA-SB's own are; clamped ones were not
    a, lower = torch.linalg.qr(right.double().t())
    return Combined(b, upper @ lower.t(), a.t(), error)


def _truncated_svd(layer: AdaptedLayer, weighted_names: list[tuple[float, str]], rank: int | None) -> Combined:
    """The truncated SVD of Σ w s B R A, in fp64, without a matrix of W's size."""
    b = torch.cat([layer.lorasb_B[name].double() for _, name in weighted_names], 1)
    a = torch.cat([layer.lorasb_A[name].double() for _, name in weighted_names], 0)
    cores = [weight * layer.adapters[name].scaling * layer.lorasb_R[name].double() for weight, name in weighted_names]
    # QR of B [out, Σr] and Aᵀ [in, Σr] leaves a core [Σr, Σr], whose SVD is the sum's; the new factors are orthonormal.
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    u, s, vt = torch.linalg.svd(upper @ torch.block_diag(*cores) @ lower.t())
    new_rank = min(len(s), rank or len(s))
    # Eckart-Young: the dropped singular values are the error in the Frobenius norm.
    error = float(s[new_rank:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Combined(left @ u[:, :new_rank], torch.diag(s[:new_rank]), vt[:new_rank] @ right.t(), error)


def _insert(
    tuner: Any,
    adapters: Sequence[str],
    adapter_name: str,
    layers: dict[str, AdaptedLayer],
    combined: dict[str, Combined],
) -> None:
    active = list(tuner.active_adapters)  # injection may change which adapters are active
    with_modules = next((name for name in adapters if tuner.peft_config[name].modules_to_save), None)
    tuner.peft_config[adapter_name] = _config_like(tuner.peft_config[with_modules or adapters[0]], combined)
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        tuner.peft_config[adapter_name].awaits_weights = False  # no file is loaded
        for name, factors in combined.items():
            layer = layers[name]
            # the core includes every s_i; the layer multiplies by its own s again
            layer.set_factors(adapter_name, factors.b, factors.core / layer.adapters[adapter_name].scaling, factors.a)
        if with_modules is not None:
            _take_modules_over(tuner.model, with_modules, adapter_name)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        for layer in layers.values():
            if adapter_name in layer.lorasb_R:
                layer.delete_adapter(adapter_name)
        raise
    tuner.set_adapter(active)


def _take_modules_over(model: torch.nn.Module, old: str, new: str) -> None:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and old in module.modules_to_save:
            module.update(new)
            module.modules_to_save[new].load_state_dict(module.modules_to_save[old].state_dict())
            module.modules_to_save[new].requires_grad_(False)


def _config_like(template: Any, combined: dict[str, Combined]) -> Any:
    config = copy.deepcopy(template).weights_follow()
    config.__dict__.pop("_asked", None)  # or `start_over` would restore the template's ranks and targets
    ranks = {name: factors.core.shape[0] for name, factors in combined.items()}
    config.r = max(ranks.values())
    config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    # Layers are named in full and every rank is set, so the template's selections must not filter them again.
    config.target_modules, config.inference_mode = set(combined), True
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.basis, config.basis_start = None, "zero"  # the sum has separate factors
    return config
