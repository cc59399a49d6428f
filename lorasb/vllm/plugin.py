"""The plugin: its entry point, which vLLM calls in each of its processes, the reading of files, and slots of R.

A layer of vLLM has one A and B, and R_k in slot k: y_i += B R_k A x_i, where k is the slot of token i.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .. import functional as functional  # registers the backends
from ..backends import cpp
from ..checkpoints.adapter_file import difference, group_by_layer, read_config, read_cores, read_tensors
from ..checkpoints.shared_factors import digest, is_factor
from ..compat import vllm as private
from ..kernels.block_sizes import padded_rank
from ..ops.registry import unavailable

BASIS = "LORASB_BASIS"  # environment variable: folder of the basis, or of any adapter that has its A and B
GATHERED = 1024  # tokens whose R's are gathered at a time, without a kernel for it


class Basis(NamedTuple):
    """A and B by layer, and what identifies them."""

    folder: Path
    digest: bytes  # SHA-256 of all A and B, stored in the file of every adapter on them
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
        version = getattr(sys.modules.get("vllm"), "__version__", "as installed")
        raise ImportError(
            f"{BASIS} is set, but vllm {version} has no {gone[0]}: install vllm{private.VERSIONS}, or export the "
            "adapters with lorasb.export_lora(...) and serve them as plain LoRAs, without it"
        )
    read_config(Path(folder))  # raises for a folder that holds no adapter, before a model is loaded
    private.install(private.Parts(lambda: read_basis(Path(folder)), check_base, _cores, CoreSlots))


def read_basis(folder: Path) -> Basis:
    """Read A and B of a basis or of an adapter that has its own; raise a ValueError if they are damaged or missing."""
    config, tensors = read_config(folder), read_tensors(folder)
    factors = {name: (parts["lorasb_A"], parts["lorasb_B"]) for name, parts in group_by_layer(tensors).items()}
    odd = next((name for name, (a, b) in factors.items() if a.dim() != 2 or b.dim() != 2), None)
    if odd is not None:
        raise ValueError(f"{folder} adapts {odd}, which is not a linear: serve the export, lorasb.export_lora(...)")
    found = digest({key: value for key, value in tensors.items() if is_factor(key)})
    return Basis(folder, found, factors, dict(config.get("base_fingerprint") or {}))


def check_base(basis: Basis, model: Path) -> None:
    """Raise a ValueError if the weights in a folder's safetensors files differ from the basis's fingerprint."""
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
    """Return R by layer, times s; raise a ValueError if an adapter is damaged or not on the server's basis."""
    cores = read_cores(folder, read_config(folder), {basis.digest})
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


class CoreSlots:
    """One A and B per part of a layer (q, k and v, or gate and up), and an R per part in every slot.

    Args:
        factors: (A [r, in], B [out, r]) of each part on this rank; None for a part without an adapter.
        sizes: output features of each part on this rank.
        count: number of slots.
        dtype: of A, B and the R's.
        device: of A, B and the R's.

    Raises:
        ValueError: the shapes of A and B are not the layer's.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        sizes: Sequence[int],
        in_features: int,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        pairs = {j: pair for j, pair in enumerate(factors) if pair is not None}
        r = self.r = max(a.shape[0] for a, _ in pairs.values())
        self.parts = list(pairs)
        self.first = [sum(sizes[:j]) for j in self.parts]  # their first columns in y
        self.A = torch.zeros((len(self.parts) * r, in_features), dtype=dtype, device=device)
        self.B = [torch.zeros((sizes[j], r), dtype=dtype, device=device) for j in self.parts]
        for rows, columns, (j, (a, b)) in zip(self.A.split(r), self.B, pairs.items(), strict=True):
            if a.shape[1:] != (in_features,) or b.shape[:1] != (sizes[j],):
                got = f"A {list(a.shape)} and B {list(b.shape)}"
                raise ValueError(f"expected A [r, {in_features}] and B [{sizes[j]}, r], got {got}: another base model")
            rows[: len(a)].copy_(a)
            columns[:, : b.shape[1]].copy_(b)
        self.numbers = torch.arange(len(self.parts), device=device)
        self.cores = torch.zeros((count, len(self.parts), r, r), dtype=dtype, device=device)

    def shared(self) -> dict[str, Tensor]:
        """Return the tensors that all adapters share."""
        return {"A": self.A, "numbers": self.numbers, **{f"B{j}": b for j, b in enumerate(self.B)}}

    def clear(self, slot: int) -> None:
        """R = 0 in a slot."""
        self.cores[slot] = 0

    def write(self, slot: int, cores: Sequence[Tensor | None]) -> None:
        """Write the R [r, r] of each part of the layer; None writes 0, and a smaller R is padded."""
        for place, j in zip(self.cores[slot], self.parts, strict=True):
            core = cores[j]
            place.zero_()
            if core is not None:
                place[: len(core), : len(core)].copy_(core)

    def add_to(self, y: Tensor, x: Tensor, index: Tensor) -> None:
        """y_i += B R_k A x_i in place, k = index[i]; rows with index -1 are unchanged.

        Args:
            y: [T, Σ sizes], in the slots' dtype.
            x: [T, in].
            index: [T], int64, on x's device; on a GPU its range is not checked.
        """
        if x.is_cpu and x.dtype != torch.float64 and cpp.missing() is None:
            cpp.add_rows(y, x, self.A, self.cores, self.B, self.first, index)
            return
        u, count = x @ self.A.t(), len(self.parts)
        cores = self.cores.flatten(0, 1)  # R of part p in slot k is number k·count + p
        if count > 1:
            index = (index.unsqueeze(1) * count + self.numbers).clamp_(min=-1).flatten()
        vs = times_cores(u.view(-1, self.r), cores, index).view(u.shape).split(self.r, 1)
        for v, b, first in zip(vs, self.B, self.first, strict=True):
            y[:, first : first + b.shape[0]].addmm_(v, b.t())


def times_cores(u: Tensor, cores: Tensor, index: Tensor) -> Tensor:
    """Return R_k u_i [T, r] for u [T, r], cores [K, r, r] and k = index[i]; zero where k is -1. No gradients."""
    if u.is_cuda and unavailable("triton") is None:
        from ..kernels.row_cores import RowProducts

        out = RowProducts(cores, index, 1.0).times(u, True, u.new_empty((len(u), padded_rank(cores.shape[1]))))
        return out[:, : u.shape[1]]
    products = []
    for rows, places in zip(u.split(GATHERED), index.split(GATHERED), strict=True):
        chosen = cores.index_select(0, places.clamp(min=0))  # no synchronization: a CUDA graph can capture it
        products.append(torch.bmm(chosen, rows.unsqueeze(2)).squeeze(2).masked_fill_((places < 0).unsqueeze(1), 0.0))
    return torch.cat(products)
