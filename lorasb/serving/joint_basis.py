"""One basis for several adapters: the A and B that keep most of all their updates, and each adapter's R on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..config.adapter import LoRASBConfig, adapt_exactly
from ..constants import CONFIG_NAME, PEFT_PREFIX, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import layers_with, refuse_basis_of_others, refuse_uninitialized
from ..utils.precision import double
from ..utils.reading import read_json, read_tensors
from .basis import COPIED

ROUNDS = 8  # rounds of improving B and A in turn; none keeps less than the one before
Energies = tuple[float, float]  # energy of the part of an update that a basis keeps, and of the entire update


class Update(NamedTuple):
    """Δ [out, in] = left · core · right, with orthonormal columns of `left` and rows of `right`, in fp64."""

    left: Tensor
    core: Tensor
    right: Tensor

    @classmethod
    def of(cls, b: Tensor, core: Tensor, a: Tensor) -> Update:
        """Make an update from any factors B [out, r], core [r, r] and A [r, in]."""
        left, upper = torch.linalg.qr(double(b))
        right, lower = torch.linalg.qr(double(a).t())
        return cls(left, upper @ double(core) @ lower.t(), right.t())

    @property
    def energy(self) -> float:
        return float(self.core.square().sum())

    def on(self, b: Tensor, a: Tensor) -> Tensor:
        """Bᵀ Δ Aᵀ [r, r]."""
        return (b.t() @ self.left) @ self.core @ (self.right @ a.t())


@dataclass
class KeptShares:
    """Share of the updates' energy that a basis keeps, ‖Bᵀ Δ Aᵀ‖² / ‖Δ‖²."""

    by_layer: dict[str, dict[str, float]] = field(default_factory=dict)  # adapter, layer -> share; 1 if the update is 0
    overall: dict[str, float] = field(default_factory=dict)  # adapter -> share over all layers together


@torch.no_grad()
def share_basis(model: PeftModel, adapters: Sequence[str], name: str, r: int | None = None) -> KeptShares:
    """Add an adapter whose A and B suit several other adapters, and move those onto it.

    With Δ_k = s·B_k R_k A_k scaled to ‖Δ_k‖ = 1, the basis maximizes Σ_k ‖Bᵀ Δ_k Aᵀ‖²; then R_k = Bᵀ Δ_k Aᵀ / s.

    Args:
        model: a PeftModel with the adapters, all initialized and of the same layers.
        adapters: names of two or more; each gets its best R on the new basis.
        name: name of the new adapter, which starts at R = 0.
        r: rank of the basis; the adapters' largest by default.

    Returns:
        `overall` and `by_layer`: the share of each adapter's energy that is kept.

    Raises:
        ValueError: fewer than two adapters, one is unknown or not initialized, or others share one's factors.
    """
    layers = _layers_of_all(model, adapters)
    ranks = {}
    for layer, module in layers.items():
        wanted = r if r is not None else max(module.adapters[adapter].r for adapter in adapters)
        ranks[layer] = min(wanted, module.in_features, module.out_features)
    joint = _joined(layers, adapters, ranks)  # everything that may fail comes before the model changes
    like = cast(LoRASBConfig, model.peft_config[adapters[0]])
    config = LoRASBConfig(init="update")
    adapt_exactly(config, ranks)
    config.task_type, config.target_parameters = like.task_type, copy.copy(like.target_parameters)
    model.add_adapter(name, config.weights_follow())
    return _move_onto(model, adapters, name, joint)


@torch.no_grad()
def share_into(model: PeftModel, adapters: Sequence[str], name: str) -> KeptShares:
    """Write the joint basis into an existing adapter, at its ranks; its R becomes zero."""
    layers = _layers_of_all(model, adapters)
    joint = _joined(layers, adapters, {layer: module.adapters[name].r for layer, module in layers.items()})
    return _move_onto(model, adapters, name, joint)


Joint = dict[str, tuple[list[Update], Tensor, Tensor]]  # layer -> the adapters' updates, and B and A for all of them


def _joined(layers: Mapping[str, AdaptedLayer], adapters: Sequence[str], ranks: Mapping[str, int]) -> Joint:
    found = {layer: [_update_of(module, adapter) for adapter in adapters] for layer, module in layers.items()}
    return {layer: (updates, *joint_factors(updates, ranks[layer])) for layer, updates in found.items()}


def _move_onto(model: PeftModel, adapters: Sequence[str], name: str, joint: Joint) -> KeptShares:
    """Give an adapter the joint B and A, and R = 0; give the others the same B and A, and R by projection."""
    kept: dict[str, dict[str, Energies]] = {adapter: {} for adapter in adapters}
    layers = layers_with(model, name)
    for layer, module in layers.items():
        updates, b, a = joint[layer]
        r, scaling = module.adapters[name].r, module.adapters[name].made_with
        module.set_factors(name, b, torch.zeros(r, r), a)
        for adapter, update in zip(adapters, updates, strict=True):
            core, kept[adapter][layer] = _projected(update, module, name)
            module.move_to_basis(adapter, name, core / scaling)
    configs = cast("dict[str, LoRASBConfig]", model.peft_config)
    for adapter in adapters:
        config, of_basis = configs[adapter], configs[name]
        for part in (*COPIED, "r", "rank_pattern"):
            setattr(config, part, copy.deepcopy(getattr(of_basis, part)))
        config.basis = name
    by_layer = {adapter: {layer: share_of([pair]) for layer, pair in found.items()} for adapter, found in kept.items()}
    return KeptShares(by_layer, {adapter: share_of(found.values()) for adapter, found in kept.items()})


def joint_factors(updates: Sequence[Update], r: int) -> tuple[Tensor, Tensor]:
    """The orthonormal B [out, r] and A [r, in] that keep most of several updates, each scaled to unit norm."""
    # Higher-order orthogonal iteration in the coordinates of the adapters' own factors: nothing of W's size is formed.
    left = torch.linalg.qr(torch.cat([one.left for one in updates], 1)).Q
    right = torch.linalg.qr(torch.cat([one.right for one in updates], 0).t()).Q
    inner = torch.stack([one.on(left, right.t()) / max(one.energy, 1e-300) ** 0.5 for one in updates])
    a = _leading(inner.mT @ inner, r)  # of Σ Δ_kᵀ Δ_k
    for _ in range(ROUNDS):
        b = _leading((inner @ a) @ (inner @ a).mT, r)
        a = _leading((inner.mT @ b) @ (inner.mT @ b).mT, r)
    return _completed(left @ b, r), _completed(right @ a, r).t()


@torch.no_grad()
def keep_most_of(
    model: nn.Module, updates: Mapping[str, Mapping[str, Update]], adapter: str = "default"
) -> list[float]:
    """Give an adapter R = 0 and the A and B that keep most of several updates; return the share kept of each.

    Args:
        model: the model with the adapter.
        updates: a LoRA's folder -> layer -> its update.
        adapter: name of the adapter.

    Raises:
        ValueError: a LoRA of layers that the model does not have, or has in other shapes.
    """
    layers = layers_with(model, adapter)
    for folder, one in updates.items():
        for name, update in one.items():
            if name not in layers:
                raise ValueError(
                    f"{folder} has an update of layer {name!r}, which this model lacks: it is for another one"
                )
            _refuse_other_shape(folder, name, update, layers[name])
    kept: list[list[Energies]] = [[] for _ in updates]
    for name, layer in layers.items():
        mine, r = [one[name] for one in updates.values()], layer.adapters[adapter].r
        b, a = joint_factors(mine, r)
        layer.set_factors(adapter, b, torch.zeros(r, r), a)
        for found, update in zip(kept, mine, strict=True):
            found.append(_projected(update, layer, adapter)[1])
    return [share_of(found) for found in kept]


def _leading(moments: Tensor, r: int) -> Tensor:
    """The leading eigenvectors [m, r] of the sum of symmetric matrices [K, m, m]."""
    vectors = torch.linalg.eigh(moments.sum(0)).eigenvectors
    return vectors[:, -r:].flip(1)


def _completed(columns: Tensor, r: int) -> Tensor:
    """Orthonormal columns [n, r]; where the updates span fewer directions, random ones are added."""
    missing = r - columns.shape[1]
    if missing <= 0:
        return columns
    g = torch.Generator().manual_seed(0)
    more = torch.randn(columns.shape[0], missing, generator=g, dtype=columns.dtype, device="cpu").to(columns.device)
    return torch.linalg.qr(torch.cat((columns, more), 1)).Q


@torch.no_grad()
def project(model: PeftModel, lora: str | Path, name: str, basis: str = "default", most_lost: float = 0.1) -> float:
    """Add an existing plain LoRA as an adapter on a basis, and return the share of its energy that is lost.

    Args:
        model: a PeftModel with the adapter `basis`.
        lora: folder of a PEFT LoRA adapter of linear layers.
        name: name of the new adapter.
        basis: the adapter whose A and B it shares.
        most_lost: largest share of ‖Δ‖² over all layers that may be lost, including layers that the basis lacks.

    Raises:
        ValueError: no LoRA in the folder, other shapes, or more than `most_lost` lost; the model is unchanged.
    """
    layers = layers_with(model, basis)
    cores, kept = {}, []
    for layer, update in lora_updates(Path(lora)).items():
        module = layers.get(layer)
        if module is None:
            kept.append((0.0, update.energy))
            continue
        _refuse_other_shape(lora, layer, update, module)
        core, pair = _projected(update, module, basis)
        cores[layer] = core / module.adapters[basis].made_with
        kept.append(pair)
    lost = 1.0 - share_of(kept)
    if lost > most_lost:
        raise ValueError(
            f"{lora} would lose {lost:.1%} of its energy on the basis {basis!r}, more than {most_lost:.1%}: make a "
            f"basis of several adapters (lorasb.share_basis), or pass most_lost={min(1.0, lost + 0.01):.2f}"
        )
    model.add_adapter(name, LoRASBConfig(basis=basis))
    for layer, module in layers_with(model, name).items():
        if layer in cores:
            module.lorasb_R[name].data.copy_(cores[layer])
    return lost


def _refuse_other_shape(lora: str | Path, name: str, update: Update, layer: AdaptedLayer) -> None:
    found, expected = (update.left.shape[0], update.right.shape[1]), (layer.out_features, layer.in_features)
    if found != expected:
        where = f"of layer {name!r}, which is {list(expected)}"
        raise ValueError(f"{lora} has an update {list(found)} {where}: it belongs to another base model")


def lora_updates(folder: Path) -> dict[str, Update]:
    """The updates of a plain PEFT LoRA by layer; a ValueError for any other adapter."""
    config_file, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_file.is_file() or not weights.is_file():
        raise ValueError(f"expected a LoRA adapter with {CONFIG_NAME} and {WEIGHTS_NAME} in {folder}, found none")
    config = read_json(config_file)
    other = {"DoRA": config.get("use_dora"), "LoRA with a bias of B": config.get("lora_bias")}
    if config.get("peft_type") != "LORA" or any(other.values()):
        kind = next((name for name, is_so in other.items() if is_so), config.get("peft_type"))
        raise ValueError(f"expected a plain LoRA in {folder}, got {kind}")
    tensors = read_tensors(weights)
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    found = {}
    for key, a in tensors.items():
        name, separator, _ = key.removeprefix(PEFT_PREFIX).rpartition(".lora_A")
        b = tensors.get(key.replace(".lora_A", ".lora_B"))
        if separator and b is not None and a.dim() == 2:
            alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
            scale = float(alpha) / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ValueError(f"expected finite values in {weights}, got NaN or Inf in {name}: its training failed")
            found[name] = Update.of(b, torch.eye(len(a), dtype=torch.float64) * scale, a)
    others = [key for key in tensors if key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] not in found]
    if not found or others:
        what = f"{others[0]}, ..." if others else "none of them"
        raise ValueError(f"expected lora_A and lora_B of linear layers and nothing else in {weights}, got {what}")
    return found


def _update_of(layer: AdaptedLayer, adapter: str) -> Update:
    core = double(layer.lorasb_R[adapter]) * layer.adapters[adapter].scaling
    return Update.of(layer.lorasb_B[adapter], core, layer.lorasb_A[adapter])


def _projected(update: Update, layer: AdaptedLayer, basis: str) -> tuple[Tensor, Energies]:
    """The R [r, r] whose B R A is nearest to Δ, for B and A as rounded to their dtype, and (‖B R A‖², ‖Δ‖²)."""
    # R = Bᵀ Δ Aᵀ if B and A are orthonormal; with init="lora-xs" one of them includes Σ
    b, upper = torch.linalg.qr(double(layer.lorasb_B[basis]))
    a, lower = torch.linalg.qr(double(layer.lorasb_A[basis]).t())
    inside = Update(*(part.to(b.device) for part in update)).on(b, a.t())  # a LoRA's is read on the CPU
    core = torch.linalg.pinv(upper) @ inside @ torch.linalg.pinv(lower).t()
    return core, (float(inside.square().sum()), update.energy)


def kept_energies(layers: Mapping[str, AdaptedLayer], adapter: str, basis: str) -> dict[str, Energies]:
    """Layer -> (‖B R A‖², ‖Δ‖²), for an adapter's update Δ and the nearest B R A with another adapter's B and A."""
    return {name: _projected(_update_of(layer, adapter), layer, basis)[1] for name, layer in layers.items()}


def share_of(kept: Iterable[Energies]) -> float:
    """Sum of the first energies over the sum of the second; 1 if all are zero."""
    pairs = list(kept)
    total = math.fsum(whole for _, whole in pairs)
    return math.fsum(part for part, _ in pairs) / total if total > 0 else 1.0


def _layers_of_all(model: nn.Module, adapters: Sequence[str]) -> dict[str, AdaptedLayer]:
    if len(set(adapters)) < 2:
        raise ValueError(f"expected two adapters or more to share a basis, got {list(adapters)}")
    layers = layers_with(model, adapters[0])
    for adapter in adapters:
        mine = layers_with(model, adapter)
        if not mine or mine.keys() != layers.keys():
            raise ValueError(f"expected the same layers, {adapter!r} has {len(mine)}, {adapters[0]!r} {len(layers)}")
        refuse_uninitialized(mine, adapter)
        refuse_basis_of_others(mine, adapter)
    return layers
