"""The A and B of adapters that a vLLM server holds in common."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints.adapter_file import difference, group_by_layer, read_config, read_tensors
from ..checkpoints.shared_factors import digest, is_factor


class Basis(NamedTuple):
    """A and B by layer, and what names them."""

    folder: Path
    digest: bytes  # SHA-256 of all A and B, which the file of every adapter on them has
    factors: dict[str, tuple[Tensor, Tensor]]  # layer -> A [r, in], B [out, r]
    fingerprint: dict[str, str]  # sampled weights of the base model, by layer; empty if the adapter has none


def read_basis(folder: Path) -> Basis:
    """Read A and B from a basis (`lorasb basis make`) or from any adapter that has its own.

    Raises:
        ValueError: no LoRA-SB adapter, a damaged one, or one that has R alone.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    factors = {name: (parts["lorasb_A"], parts["lorasb_B"]) for name, parts in group_by_layer(tensors).items()}
    odd = next((name for name, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2), None)
    if odd is not None:
        raise ValueError(f"{folder} adapts {odd}, which is no linear: export it, lorasb.export_lora(...), to serve it")
    found = digest({key: value for key, value in tensors.items() if is_factor(key)})
    return Basis(folder, found, factors, dict(config.get("base_fingerprint") or {}))


def check_base(basis: Basis, model: Path) -> None:
    """Raise a ValueError if the weights in a model's folder differ from the fingerprint in the basis.

    Nothing is compared where the folder has no safetensors files, or other names of weights.
    """
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    weights: dict[str, Tensor | None] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as reader:
            there = set(reader.keys())
            weights |= {n: reader.get_tensor(f"{n}.weight") for n in basis.fingerprint if f"{n}.weight" in there}
    known = {name: text for name, text in basis.fingerprint.items() if name in weights}
    reason = difference(weights, known)
    if reason:
        raise ValueError(f"{basis.folder} was made on another base model than {model}: {reason}")


def in_dtype(cores: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The R's in a dtype; a ValueError if one is not square, or not finite there."""
    odd = next((n for n, core in cores.items() if core.dim() != 2 or core.shape[0] != core.shape[1]), None)
    if odd is not None:
        raise ValueError(f"R of layer {odd!r} is {list(cores[odd].shape)}, expected [r, r]")
    largest = torch.stack([torch.linalg.vector_norm(core, float("inf")) for core in cores.values()])
    inside = largest <= torch.finfo(dtype).max  # False for NaN, too
    if not bool(inside.all()):
        odd = next(name for name, one in zip(cores, inside.tolist(), strict=True) if not one)
        raise ValueError(f"R of layer {odd!r} has NaN or Inf values in {dtype}: its training had failed")
    return {name: core if core.dtype == dtype else core.to(dtype) for name, core in cores.items()}
