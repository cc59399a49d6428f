"""Provenance of an initialization: the record in an adapter's config, and the key of a cache of signs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..constants import VERSION
from ..distributed.process_group import full_tensor
from .init_report import InitReport
from .task import InitOptions, Layers

SIGNS_SINCE = "0.1.0"  # the first version whose signs are bitwise equal to this one's: its caches are still valid
HASHED_VALUES = 64  # values per weight, evenly spaced, in the hash of a model


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    own = {"lorasb": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in ("transformers", "peft")}


def provenance(report: InitReport, data_hash: str | None) -> dict[str, object]:
    """The record of an initialization that an adapter's config stores (`init_provenance`)."""
    fields = ("init", "update", "lr", "longest_start", "num_samples", "seed", "loss")
    return {name: getattr(report, name) for name in fields} | {"data_sha256": data_hash, "versions": versions()}


def cache_key(model: nn.Module, layers: Layers, options: InitOptions, seen: int, data: str | None) -> dict[str, object]:
    """Everything that the signs of a model depend on, by field; a mismatch is reported by the field's name."""
    # The rank and η are not among it: any adapter can be initialized from the same signs. A loss counts by its name.
    loss = getattr(options.loss_fn, "func", options.loss_fn)  # of a partial, its function
    return {
        "dtype": str(next(iter(layers.values())).base.dtype).removeprefix("torch."),
        "base weights": weights_hash(model),
        "update": options.update,
        "seed": options.seed,
        "num_samples": seen,
        "data": data,
        "loss_fn": None if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__),
        "versions": versions() | {"lorasb": SIGNS_SINCE},
    }


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and 64 values of every base weight; no values of offloaded weights."""
    # A sample of the values tells models apart, without reading all weights.
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lorasb_" in name:
            continue
        # A target's weight is renamed by its adapter; the hash should not depend on which layers are adapted.
        digest.update(f"{name.replace('.base_layer', '')} {list(weight.shape)} {weight.dtype}".encode())
        for full in _plain_tensors(weight):
            flat = full.reshape(-1)
            # fp64: fp32 cannot represent the indices of large weights
            indices = torch.linspace(0, flat.numel() - 1, HASHED_VALUES, dtype=torch.float64).long().to(flat.device)
            digest.update(flat[indices].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(weight: Tensor) -> list[Tensor]:
    """Return the unsharded weight (a collective under FSDP2), or the tensors of a quantizer's; none on meta."""
    if weight.is_meta:
        return []
    data = full_tensor(weight).data
    parts = [data]
    if is_traceable_wrapper_subclass(data):
        parts = [getattr(data, name) for name in data.__tensor_flatten__()[0]]
    return [part for part in parts if part.numel()]
