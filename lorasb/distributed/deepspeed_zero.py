"""Saving A and B under DeepSpeed ZeRO-3, which partitions all parameters and omits frozen ones from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..compat.accelerate import is_managed, is_partitioned
from ..constants import FROZEN_FACTORS
from ..layers.linear import LoRASBLinear

# Copies of A and B in host memory of the rank that saves. Gathering a partitioned parameter is a collective, but a
# state dict is built on one rank only, so the copies are made beforehand. Weak keys: copies are freed with their layer.
_factor_copies: WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]] = WeakKeyDictionary()


def keep_factors(layers: Mapping[str, LoRASBLinear], name: str, first: bool) -> None:
    """Copy A and B to host memory of the `first` rank for later saves; a collective that every rank has to call."""
    for layer in layers.values():
        frozen = {factor: getattr(layer, factor)[name] for factor in FROZEN_FACTORS}
        if any(is_partitioned(p) for p in frozen.values()):
            import deepspeed

            # One layer at a time: no rank ever holds the gathered factors of all layers on its GPU.
            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                if first:
                    # `clone`: on a CPU run `cpu()` is no copy, and ZeRO frees the storage when the block is left.
                    gathered = {factor: p.detach().cpu().clone() for factor, p in frozen.items()}
                    _factor_copies.setdefault(layer, {})[name] = gathered


def with_kept_factors(tensors: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """Add the A and B that ZeRO-3 omitted to an adapter's state dict; a ValueError without `keep_factors`."""
    complete = dict(tensors)
    for key in tensors:
        prefix, separator, _ = key.partition(".lorasb_R")
        layer = model.get_submodule(prefix) if separator else None
        if not isinstance(layer, LoRASBLinear):
            continue
        for factor in FROZEN_FACTORS:
            if is_managed(getattr(layer, factor)[name]):  # without ZeRO the state dict has A and B already
                complete[key.replace(".lorasb_R", f".{factor}")] = _value(layer, prefix, factor, name)
    return complete


def _value(layer: LoRASBLinear, path: str, factor: str, name: str) -> Tensor:
    parameter: Tensor = getattr(layer, factor)[name]
    if not is_partitioned(parameter):
        return parameter.detach()
    if name not in _factor_copies.get(layer, {}):
        raise ValueError(
            f"A and B of {path} are partitioned by ZeRO-3, and saving gathers only what is "
            "trained: keep lorasb.InitCallback() among the Trainer's callbacks, which gathers them"
        )
    return _factor_copies[layer][name][factor]
