"""A and B of a run that resumes under FSDP: its state holds R alone, and the adapter saved beside it has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.adapter_file import check_tensors, group_by_layer, read_tensors
from ..constants import WEIGHTS_NAME
from ..layers.linear import LoRASBLinear
from .process_group import Processes

Parts = dict[str, dict[str, Tensor]]  # layer name -> factor -> its value


def restore_factors(layers: dict[str, LoRASBLinear], name: str, folders: Iterable[Path]) -> bool:
    """Put A and B of the first saved adapter that has the layers' R into the layers.

    Every process calls this; the first one reads, as it does of FSDP's own files.

    Args:
        layers: all that have the adapter, by their names in the base model.
        name: the adapter's.
        folders: checkpoints that may be the one that R came from.

    Returns:
        Whether there was one. If not, the layers are as they were.

    Raises:
        ValueError: its files are damaged or do not fit, or it has NaN or Inf entries.
        RuntimeError: in the other processes then.
    """
    processes, found, error = Processes(), None, None
    cores = {layer: _whole(module.lorasb_R[name]) for layer, module in layers.items()}
    try:
        found = _read(layers, name, cores, folders) if processes.rank == 0 else None
    except (ValueError, OSError) as caught:
        error = caught
    processes.agree(error, "resuming")
    if not processes.gather(int(found is not None))[0]:
        return False
    for layer, module in layers.items():
        mine = found[layer] if found else {}
        b, a = (_sent(processes, mine.get(part), module, part, name) for part in ("lorasb_B", "lorasb_A"))
        module.set_factors(name, b, cores[layer], a)
    return True


def _whole(parameter: Tensor) -> Tensor:
    """The value of a parameter, which FSDP2 may have sharded: every process asks for it then."""
    value: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return value.detach()


def _read(
    layers: dict[str, LoRASBLinear], name: str, cores: dict[str, Tensor], folders: Iterable[Path]
) -> Parts | None:
    """The factors in the first folder whose R is `cores`, checked."""
    for checkpoint in folders:
        folder = checkpoint if name == "default" else checkpoint / name  # where PEFT puts an adapter of another name
        if not (folder / WEIGHTS_NAME).is_file():
            continue
        tensors = read_tensors(folder)
        found = group_by_layer(tensors)
        if all(layer in found and torch.equal(found[layer]["lorasb_R"], core.cpu()) for layer, core in cores.items()):
            check_tensors(tensors, {layer: module.shapes(name) for layer, module in layers.items()})
            return found
    return None


def _sent(processes: Processes, mine: Tensor | None, layer: LoRASBLinear, part: str, name: str) -> Tensor:
    """A factor from the process that read it."""
    dtype = getattr(layer, part)[name].dtype
    blank = torch.empty(layer.shapes(name)[part], dtype=dtype)
    return processes.from_owner(blank if mine is None else mine.to(dtype), 0)
