"""A and B under sharding: restored when FSDP resumes from R alone, gathered when DeepSpeed ZeRO-3 saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checkpoints.adapter_file import check_tensors, group_by_layer, read_tensors
from ..compat.accelerate import is_managed, is_partitioned
from ..constants import FROZEN_FACTORS, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from .process_group import Processes, full_tensor

# Copies of A and B in host memory of the rank that saves. Gathering a partitioned parameter is a collective, but a
# state dict is built on one rank only, so the copies are made beforehand. Weak keys: copies are freed with their layer.
_factor_copies: WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]] = WeakKeyDictionary()


def keep_factors(layers: Mapping[str, AdaptedLayer], name: str, first: bool) -> None:
    """Copy A and B to host memory of the `first` rank for later saves; a collective that every rank has to call."""
    for layer in layers.values():
        frozen = {factor: getattr(layer, factor)[name] for factor in FROZEN_FACTORS}
        if any(is_partitioned(p) for p in frozen.values()):
            import deepspeed

            # One layer at a time: no rank ever holds the gathered factors of all layers on its GPU.
            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                if first:
                    # `clone`: on a CPU run `cpu()` does not copy, and ZeRO frees the storage when the block is left.
                    gathered = {factor: p.detach().cpu().clone() for factor, p in frozen.items()}
                    _factor_copies.setdefault(layer, {})[name] = gathered


def with_kept_factors(tensors: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """Add the A and B that ZeRO-3 omitted to an adapter's state dict; a ValueError without `keep_factors`."""
    complete = dict(tensors)
    for key in tensors:
        path, separator, _ = key.partition(".lorasb_R")
        layer = model.get_submodule(path) if separator else None
        if not isinstance(layer, AdaptedLayer):
            continue
        for factor in FROZEN_FACTORS:
            parameter: Tensor = getattr(layer, factor)[name]
            if not is_managed(parameter):  # without ZeRO the state dict has A and B already
                continue
            copies = _factor_copies.get(layer, {})
            if is_partitioned(parameter) and name not in copies:
                raise ValueError(
                    f"A and B of {path} are partitioned by ZeRO-3, and saving gathers only what is "
                    "trained: keep lorasb.InitCallback() among the Trainer's callbacks, which gathers them"
                )
            value = copies[name][factor] if is_partitioned(parameter) else parameter.detach()
            complete[key.replace(".lorasb_R", f".{factor}")] = value
    return complete


def restore_factors(layers: dict[str, AdaptedLayer], name: str, folders: Iterable[Path]) -> bool:
    """Load A and B from the first saved adapter that has the same R; True if found. A collective: rank 0 reads."""
    processes = Processes()
    # Before the files are read, and on every rank: gathering a sharded R is a collective.
    cores = {layer: full_tensor(module.lorasb_R[name]) for layer, module in layers.items()}
    with processes.together("resuming"):
        saved = _read_matching(layers, name, cores, folders) if processes.rank == 0 else None
    if not processes.all_gather(int(saved is not None))[0]:
        return False
    for layer, module in layers.items():
        frozen = {}
        for factor in FROZEN_FACTORS:
            # A broadcast needs one dtype and shape on all ranks, and the file may have been saved in another dtype.
            buffer = torch.empty(module.shapes(name)[factor], dtype=getattr(module, factor)[name].dtype)
            frozen[factor] = processes.broadcast(saved[layer][factor].to(buffer.dtype) if saved else buffer, 0)
        module.set_factors(name, frozen["lorasb_B"], cores[layer], frozen["lorasb_A"])
    return True


def _read_matching(
    layers: dict[str, AdaptedLayer], name: str, cores: dict[str, Tensor], folders: Iterable[Path]
) -> dict[str, dict[str, Tensor]] | None:
    """Factors by layer from the first folder whose R equals `cores`, with shapes and finiteness checked."""
    for checkpoint in folders:
        folder = checkpoint if name == "default" else checkpoint / name  # PEFT saves other names in a subfolder
        if not (folder / WEIGHTS_NAME).is_file():
            continue
        tensors = read_tensors(folder)
        saved = group_by_layer(tensors)
        # Bitwise equality of R identifies the adapter: A and B of another run would silently give a wrong model.
        if all(layer in saved and torch.equal(saved[layer]["lorasb_R"], core.cpu()) for layer, core in cores.items()):
            check_tensors(tensors, {layer: module.shapes(name) for layer, module in layers.items()})
            return saved
    return None
