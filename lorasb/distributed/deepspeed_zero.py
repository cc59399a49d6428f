"""A and B under DeepSpeed's ZeRO-3, which parts all parameters among processes and leaves frozen ones out of files."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..constants import FROZEN_FACTORS
from ..layers.linear import LoRASBLinear

# What the first process keeps on its host for the adapter's files, as gathering takes all processes and a save one.
_kept: WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]] = WeakKeyDictionary()


def is_parted(parameter: Tensor) -> bool:
    """Whether this process holds only its part, and the parameter itself is empty."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def keep_factors(layers: Mapping[str, LoRASBLinear], name: str, first: bool) -> None:
    """Gather A and B, layer by layer, for the files to come; every process calls this.

    Args:
        layers: all that have the adapter.
        name: the adapter's.
        first: whether this is the process that saves.
    """
    for layer in layers.values():
        frozen = {part: getattr(layer, part)[name] for part in FROZEN_FACTORS}
        if any(is_parted(p) for p in frozen.values()):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                if first:
                    whole = {part: p.detach().cpu().clone() for part, p in frozen.items()}
                    _kept.setdefault(layer, {})[name] = whole


def with_kept_factors(tensors: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors with the A and B that ZeRO-3 left out, after each R.

    Raises:
        ValueError: they are parted and were not kept.
    """
    found = dict(tensors)
    for key in tensors:
        prefix, middle, _ = key.partition(".lorasb_R")
        layer = model.get_submodule(prefix) if middle else None
        if not isinstance(layer, LoRASBLinear):
            continue
        for part in FROZEN_FACTORS:
            other = key.replace(".lorasb_R", f".{part}")
            own = getattr(layer, part)[name]
            if hasattr(own, "ds_id"):
                if is_parted(own) and name not in _kept.get(layer, {}):
                    raise ValueError(
                        f"A and B of {prefix} are parted among processes (ZeRO-3), and saving gathers only what is "
                        "trained: keep lorasb.InitCallback() among the Trainer's callbacks, which gathers them"
                    )
                found[other] = _kept[layer][name][part] if is_parted(own) else own.detach()
    return found
