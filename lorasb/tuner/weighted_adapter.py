"""Weighted sum of adapters as a new adapter, ΔW = Σ_i w_i s_i B_i R_i A_i: exact if they share A and B, else the best
approximation of a given rank.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ..config.adapter import LoRASBConfig, adapt_exactly
from ..constants import MAX_RANK
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import adapted_layers, any_merged, discard, refuse_uninitialized
from ..serving.basis import check_names
from ..serving.joint_basis import Update
from ..utils.precision import double, factorable

PRUNING = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude_prune": magnitude_prune}
SVD = "_svd"  # suffix of the kinds that prune updates of W [out, in] instead of R
SIGN_METHODS = ("total", "frequency")
KINDS = ("auto", "linear", "svd", "cat", *PRUNING, *(f"{kind}{SVD}" for kind in PRUNING))


@dataclass(frozen=True)
class SumOptions:
    """Method of summing adapters; the names are PEFT's."""

    # "linear" adds the R's of adapters that share A and B, exactly; "svd" is the best approximation of rank `svd_rank`;
    # "cat" is exact, with the sum of the ranks; "auto" is "linear" for shared A and B, else "svd"; the others prune
    # first. "linear" and pruning act as their "_svd" forms where A and B are not shared.
    combination_type: str = "auto"
    svd_rank: int | None = None  # the largest of the adapters' ranks by default
    svd_clamp: float | None = None  # quantile that entries of U Σ and Vᵀ are clamped to
    svd_full_matrices: bool = False
    svd_driver: str | None = None
    density: float | None = None  # share of entries that stay, for pruning
    majority_sign_method: str = "total"  # how TIES elects a sign: by the sum ("total") or by votes ("frequency")

    @property
    def pruning(self) -> str | None:
        """The kind of pruning before the sum, or None."""
        kind = self.combination_type.removesuffix(SVD)
        return kind if kind in PRUNING else None

    def check(self) -> None:
        """Raise a ValueError for an unknown kind, or a rank, density or sign method that is out of range."""
        if self.combination_type not in KINDS:
            raise ValueError(f"combination_type must be one of {', '.join(KINDS)}, got {self.combination_type!r}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank must be positive, got {self.svd_rank}")
        kind, density = self.pruning, self.density
        if kind is None:
            return
        least, low = ("(", 1e-9) if kind.startswith("dare") else ("[", 0.0)  # DARE divides by it
        if not isinstance(density, int | float) or isinstance(density, bool) or not low <= density <= 1.0:
            raise ValueError(f"{kind} takes density in {least}0, 1], the share of entries that stay, got {density!r}")
        if self.majority_sign_method not in SIGN_METHODS:
            methods = " or ".join(map(repr, SIGN_METHODS))
            raise ValueError(f"majority_sign_method must be {methods}, got {self.majority_sign_method!r}")

    def add(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Sum weights · tensors of one shape, pruned if requested. DARE draws from torch's global random state."""
        given = list(tensors), torch.tensor(weights, device=tensors[0].device, dtype=tensors[0].dtype)
        if self.pruning is None:
            return task_arithmetic(*given)
        sign_method = [self.majority_sign_method] if self.pruning.endswith("ties") else []
        total: Tensor = PRUNING[self.pruning](*given, cast(float, self.density), *sign_method)
        return total


class Combined(NamedTuple):
    """One layer's new factors, B [out, r], R [r, r] without s, A [r, in], and ‖ΔW − s·B R A‖ / ‖ΔW‖."""

    b: Tensor
    core: Tensor
    a: Tensor
    error: float


@torch.no_grad()
def combine(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, options: SumOptions
) -> dict[str, float]:
    """Add the adapter `adapter_name` = Σ weights · adapters to a model; see `LoRASBModel.add_weighted_adapter`."""
    options.check()
    layers = _check(tuner, adapters, weights, adapter_name)
    shared = _share_factors(layers, adapters)
    kind = options.combination_type
    combined = {}
    for name, layer in layers.items():
        weighted = [(w, n) for w, n in zip(weights, adapters, strict=True) if n in layer.lorasb_R]
        rank = options.svd_rank or max(layer.adapters[n].r for _, n in weighted)
        if shared and not kind.endswith("svd") and kind != "cat":
            combined[name] = _sum_cores(layer, weighted, options)
        elif options.pruning is not None or options.svd_clamp is not None:
            combined[name] = _of_update(layer, weighted, options, rank)
        else:
            combined[name] = _truncated_svd(layer, weighted, None if kind == "cat" else rank)
        if len(combined[name].core) > MAX_RANK:
            raise ValueError(
                f"the sum has rank {len(combined[name].core)} in layer {name!r}, more than {MAX_RANK}: use "
                f'combination_type="svd" with svd_rank={MAX_RANK} or less'
            )
    _insert(tuner, adapters, adapter_name, layers, combined)
    errors = {name: one.error for name, one in combined.items()}
    message = "adapter %r: %d layers combined, largest relative error of their updates %.2e"
    logging.getLogger("lorasb").info(message, adapter_name, len(errors), max(errors.values()))
    return errors


def _check(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> dict[str, AdaptedLayer]:
    configs = cast("dict[str, LoRASBConfig]", tuner.peft_config)
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected a weight for each adapter, got {len(adapters)} adapters and {len(weights)} weights")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"expected finite weights, got {list(weights)}")
    check_names(tuner, [adapter_name])
    if any_merged(tuner.model):
        raise ValueError("an adapter is merged into the weights: call model.unmerge_adapter() first")
    layers: dict[str, AdaptedLayer] = {}
    for name in adapters:
        _, found = adapted_layers(tuner.model, name)
        refuse_uninitialized(found, name)
        if configs[name].trainable_token_indices:
            raise ValueError(f"adapter {name!r} has trained rows of an embedding, which cannot be added: leave it out")
        layers |= found
    with_modules = [name for name in dict.fromkeys(adapters) if configs[name].modules_to_save]
    if len(with_modules) > 1:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(with_modules) - 1} such instance(s). Adapters {', '.join(map(repr, with_modules))} have some: at "
            "most one may, and the new one takes them over"
        )
    return layers


def _share_factors(layers: dict[str, AdaptedLayer], adapters: Sequence[str]) -> bool:
    for layer in layers.values():
        # adapters with different targets cannot be added by R alone
        if any(name not in layer.lorasb_R for name in adapters):
            return False
        for factors in (layer.lorasb_A, layer.lorasb_B):
            if not all(torch.equal(factors[adapters[0]], factors[name]) for name in adapters[1:]):
                return False
    return True


def _sum_cores(layer: AdaptedLayer, weighted: list[tuple[float, str]], options: SumOptions) -> Combined:
    """Σ w s R over shared A and B, in fp64: exact up to one rounding of R to fp32, if nothing is pruned."""
    weights, names = zip(*weighted, strict=True)
    cores = [layer.adapters[name].scaling * double(layer.lorasb_R[name]) for name in names]
    return Combined(layer.lorasb_B[names[0]], options.add(cores, weights), layer.lorasb_A[names[0]], 0.0)


def _of_update(layer: AdaptedLayer, weighted: list[tuple[float, str]], options: SumOptions, rank: int) -> Combined:
    """The best rank-`rank` factors of the layer's summed update [out, in], in fp32; pruned updates have full rank."""
    weights, names = zip(*weighted, strict=True)
    updates = [factorable(layer.get_delta_weight(name)).float() for name in names]
    update = options.add([layer.base.matrix(u) for u in updates], weights)
    u, s, vt = torch.linalg.svd(update, full_matrices=options.svd_full_matrices, driver=options.svd_driver)
    rank = min(rank, len(s))
    left, right = u[:, :rank] * s[:rank], vt[:rank]
    if options.svd_clamp is not None:
        bound = float(torch.cat((left.flatten(), right.flatten())).double().quantile(options.svd_clamp))
        left, right = left.clamp(-bound, bound), right.clamp(-bound, bound)
    error = float((update - left @ right).norm() / update.norm().clamp_min(1e-30))
    b, upper = torch.linalg.qr(double(left))  # orthonormal, like LoRA-SB's own; clamping breaks that
    a, lower = torch.linalg.qr(double(right).t())
    return Combined(b, upper @ lower.t(), a.t(), error)


def _truncated_svd(layer: AdaptedLayer, weighted: list[tuple[float, str]], rank: int | None) -> Combined:
    """The truncated SVD of Σ w s B R A, in fp64, without a matrix of W's size."""
    b = torch.cat([double(layer.lorasb_B[name]) for _, name in weighted], 1)
    a = torch.cat([double(layer.lorasb_A[name]) for _, name in weighted], 0)
    cores = [weight * layer.adapters[name].scaling * double(layer.lorasb_R[name]) for weight, name in weighted]
    update = Update.of(b, torch.block_diag(*cores), a)
    u, s, vt = torch.linalg.svd(update.core)  # [Σr, Σr]; its singular values are the sum's
    new_rank = min(len(s), rank or len(s))
    # Eckart-Young: the dropped singular values are the error in the Frobenius norm.
    error = float(s[new_rank:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Combined(update.left @ u[:, :new_rank], torch.diag(s[:new_rank]), vt[:new_rank] @ update.right, error)


def _insert(
    tuner: BaseTuner,
    adapters: Sequence[str],
    adapter_name: str,
    layers: dict[str, AdaptedLayer],
    sums: dict[str, Combined],
) -> None:
    configs = cast("dict[str, LoRASBConfig]", tuner.peft_config)
    active = list(tuner.active_adapters)  # injection may change them
    template = next((name for name in adapters if configs[name].modules_to_save), adapters[0])
    configs[adapter_name] = _config_like(configs[template], sums)
    opened = {name for one in adapters for name in configs[one].target_parameters or ()}  # experts that loading opens
    configs[adapter_name].target_parameters = sorted(opened) or None
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        for name, factors in sums.items():
            layer = layers[name]
            # the core already includes every s_i, and the layer multiplies by its own s
            layer.set_factors(adapter_name, factors.b, factors.core / layer.adapters[adapter_name].scaling, factors.a)
        for wrapper in tuner.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and template in wrapper.modules_to_save:
                wrapper.update(adapter_name)
                modules = wrapper.modules_to_save
                modules[adapter_name].load_state_dict(modules[template].state_dict())
                modules[adapter_name].requires_grad_(False)
    except BaseException:  # Ctrl-C, too
        discard(tuner, adapter_name)
        raise
    tuner.set_adapter(active)


def _config_like(template: LoRASBConfig, combined: dict[str, Combined]) -> LoRASBConfig:
    config = copy.deepcopy(template).weights_follow()
    config.__dict__.pop("_asked", None)  # or `start_over` would restore the template's ranks and targets
    adapt_exactly(config, {name: one.core.shape[0] for name, one in combined.items()})
    config.inference_mode = True
    config.basis, config.basis_start = None, "zero"  # the sum has separate factors
    return config
