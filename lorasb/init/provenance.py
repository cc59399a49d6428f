"""Where an initialisation comes from: what is kept with an adapter, and the key of a cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import types
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from .report import InitReport

DEPTH = 8  # of functions that a loss closes over
VALUES = 64  # of each weight go into the hash of a model


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {
        "lorasb": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("transformers", "peft")},
    }


def provenance(report: InitReport, data_hash: str | None) -> dict[str, Any]:
    """What an adapter's config keeps of its initialisation."""
    return {
        "init": report.init,
        "update": report.update,
        "lr": report.lr,
        "num_samples": report.num_samples,
        "seed": report.seed,
        "data_sha256": data_hash,
        "loss": report.loss,
        "versions": versions(),
    }


def cache_key(model: nn.Module, layer: Any, update: str, seed: int, num_samples: int | None, data_hash: str | None,
              loss_fn: Any) -> dict[str, Any]:  # fmt: skip
    """What the signs of a model depend on."""
    return {
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "base weights": weights_hash(model),
        "update": update,
        "seed": seed,
        "num_samples": num_samples,
        "data": data_hash,
        "loss_fn": function_hash(loss_fn) if loss_fn is not None else None,
        "versions": versions(),
    }


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """SHA-256 of 64 values of every weight that is no adapter's, by name: cheap, and another model has another one.

    Of a weight that is offloaded, its shape alone.
    """
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lorasb_" in name:
            continue
        found.update(f"{name.replace('.base_layer', '')} {list(weight.shape)} {weight.dtype}".encode())
        whole = _whole(weight)
        if whole is not None and whole.numel():
            flat = whole.reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
            found.update(flat[places].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _whole(weight: Tensor) -> Tensor | None:
    if weight.is_meta:
        return None
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def function_hash(function: Any) -> str:
    """A function's name, and SHA-256 of its code, its constants and what it closes over.

    Of partials, the function and its arguments; of other objects, the type and the code of its call.
    """
    found = hashlib.sha256()
    _update(found, function, depth=0)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {found.hexdigest()[:16]}"


def _update(found: Any, value: Any, depth: int) -> None:
    if isinstance(value, types.CodeType):
        found.update(value.co_code + repr((value.co_names, value.co_varnames)).encode())
        for constant in value.co_consts:
            _update(found, constant, depth + 1)
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *sorted(value.keywords.items())):
            _update(found, part, depth + 1)
    elif hasattr(value, "__code__") and depth < DEPTH:
        _update(found, value.__code__, depth + 1)
        for part in (*(value.__defaults__ or ()), *(cell.cell_contents for cell in value.__closure__ or ())):
            _update(found, part, depth + 1)
    elif isinstance(value, str | int | float | bool | bytes | tuple | frozenset | None):
        found.update(repr(value).encode())
    else:
        found.update(type(value).__qualname__.encode())
        call = vars(type(value)).get("__call__")
        if hasattr(call, "__code__") and depth < DEPTH:
            _update(found, call, depth + 1)
