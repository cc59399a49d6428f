"""Restore A and B when a run resumes under FSDP, whose checkpoint holds R only, from the adapter in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.adapter_file import check_tensors, group_by_layer, read_tensors
from ..constants import WEIGHTS_NAME
from ..layers.linear import LoRASBLinear
from .process_group import Processes, full_tensor

Factors = dict[str, dict[str, Tensor]]  # layer name -> factor name -> value


def restore_factors(layers: dict[str, LoRASBLinear], name: str, folders: Iterable[Path]) -> bool:
    """Load A and B from the first saved adapter with the layers' R; True if found. A collective: rank 0 reads files."""
    processes, saved, error = Processes(), None, None
    # Before the files are read, and on every rank: gathering a sharded R is a collective.
    cores = {layer: full_tensor(module.lorasb_R[name]) for layer, module in layers.items()}
    try:
        saved = _read_matching(layers, name, cores, folders) if processes.rank == 0 else None
    except (ValueError, OSError) as caught:
        error = caught
    processes.raise_on_every_rank(error, "resuming")
    if not processes.all_gather(int(saved is not None))[0]:
        return False
    for layer, module in layers.items():
        values = saved[layer] if saved else {}  # empty on every rank but the first
        b, a = (_broadcast(processes, values.get(f), module, f, name) for f in ("lorasb_B", "lorasb_A"))
        module.set_factors(name, b, cores[layer], a)
    return True


def _read_matching(
    layers: dict[str, LoRASBLinear], name: str, cores: dict[str, Tensor], folders: Iterable[Path]
) -> Factors | None:
    """Factors from the first folder whose R equals `cores`, with shapes and finiteness checked."""
    for checkpoint in folders:
        folder = checkpoint if name == "default" else checkpoint / name  # PEFT saves other names in a subfolder
        if not (folder / WEIGHTS_NAME).is_file():
            continue
        tensors = read_tensors(folder)
        saved = group_by_layer(tensors)
        # Bitwise equality of R identifies the adapter: A and B of another run would give a wrong model silently.
        if all(layer in saved and torch.equal(saved[layer]["lorasb_R"], core.cpu()) for layer, core in cores.items()):
            check_tensors(tensors, {layer: module.shapes(name) for layer, module in layers.items()})
            return saved
    return None


def _broadcast(processes: Processes, value: Tensor | None, layer: LoRASBLinear, factor: str, name: str) -> Tensor:
    # A broadcast needs one dtype and shape on all ranks, and the file may have been saved in another dtype.
    dtype = getattr(layer, factor)[name].dtype
    buffer = torch.empty(layer.shapes(name)[factor], dtype=dtype) if value is None else value.to(dtype)
    return processes.broadcast(buffer, 0)
