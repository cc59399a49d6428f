"""Where an initialization comes from: what is kept with an adapter, and the key of a cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__
from .init_report import InitReport

PLAIN = (str, int, float, bool, bytes, tuple, type(None))
DEPTH = 12  # of functions that a loss closes over
SAME_SIGNS = "0.1.0"  # the first version whose signs are this one's to the bit: caches since then still hold
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
    """What an adapter's config keeps of its initialization."""
    return {
        "init": report.init,
        "update": report.update,
        "lr": report.lr,
        "longest_start": report.longest_start,
        "num_samples": report.num_samples,
        "seed": report.seed,
        "data_sha256": data_hash,
        "loss": report.loss,
        "versions": versions(),
    }


def cache_key(
    model: nn.Module, layer: Any, update: str, seed: int, num_samples: int | None, data_hash: str | None, loss_fn: Any
) -> dict[str, Any]:
    """What the signs of a model depend on."""
    return {
        "dtype": str(layer.base_dtype).removeprefix("torch."),
        "base weights": weights_hash(model),
        "update": update,
        "seed": seed,
        "num_samples": num_samples,
        "data": data_hash,
        "loss_fn": function_hash(loss_fn) if loss_fn is not None else None,
        "versions": versions() | {"lorasb": SAME_SIGNS},
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
    if depth > DEPTH:
        found.update(b"deeper")
    elif isinstance(value, types.CodeType):
        found.update(value.co_code + repr((value.co_names, value.co_varnames)).encode())
        _update(found, value.co_consts, depth + 1)
    elif isinstance(value, functools.partial):
        _update(found, (value.func, value.args, value.keywords), depth + 1)
    elif isinstance(value, types.MethodType):
        _update(found, (value.__func__, value.__self__), depth + 1)
    elif isinstance(value, types.FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        _update(found, (value.__code__, value.__defaults__, value.__kwdefaults__, cells), depth + 1)
    elif isinstance(value, set | frozenset):
        found.update(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, dict):
        _update(found, tuple(sorted(value.items(), key=lambda item: repr(item[0]))), depth + 1)
    elif isinstance(value, tuple | list):
        found.update(f"{type(value).__name__} of {len(value)}".encode())
        for item in value:
            _update(found, item, depth + 1)
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, str | int | float | bool | bytes | None):
        found.update(repr(value).encode())
    else:
        _update_object(found, value, depth)


def _update_object(found: Any, value: Any, depth: int) -> None:
    """A module's type, forward and what it was set to, and any other object's type, call and attributes."""
    found.update(type(value).__qualname__.encode())
    if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
        return  # a model: its weights have their own place in the key, or are not the loss's own
    for name in ("forward", "__call__"):
        method = getattr(type(value), name, None)
        if isinstance(method, types.FunctionType) and method.__module__.partition(".")[0] != "torch":
            _update(found, method, depth + 1)
    plain = (
        {key: item for key, item in vars(value).items() if isinstance(item, PLAIN)}
        if hasattr(value, "__dict__")
        else {}
    )
    _update(found, plain, depth + 1)
