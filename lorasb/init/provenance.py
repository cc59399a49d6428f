"""Provenance of an initialization: the record in an adapter's config, and the key of a cache of signs."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..constants import VERSION
from .init_report import InitReport

HASHED_TYPES = (str, int, float, bool, bytes, tuple, type(None))  # of an object's attributes; others are ignored
MAX_DEPTH = 12  # levels of values that a loss function refers to; ends recursion in cycles
SIGNS_SINCE = "0.1.0"  # the first version whose signs are bitwise equal to this one's: its caches are still valid
HASHED_VALUES = 64  # values per weight, evenly spaced, in the hash of a model


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {
        "lorasb": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("transformers", "peft")},
    }


def provenance(report: InitReport, data_hash: str | None) -> dict[str, Any]:
    """The record of an initialization that an adapter's config stores (`init_provenance`)."""
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
    """Everything that the signs of a model depend on, by field; a mismatch is reported by the field's name.

    The rank and η are not among it: any adapter can be initialized from the same signs.
    """
    return {
        "dtype": str(layer.base_dtype).removeprefix("torch."),
        "base weights": weights_hash(model),
        "update": update,
        "seed": seed,
        "num_samples": num_samples,
        "data": data_hash,
        "loss_fn": function_hash(loss_fn) if loss_fn is not None else None,
        "versions": versions() | {"lorasb": SIGNS_SINCE},
    }


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and 64 values of every base weight; no values of offloaded weights.

    A sample of the values tells models apart, without reading all weights.
    """
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


def _plain_tensors(weight: Any) -> list[Tensor]:
    """The unsharded weight (a collective under FSDP2), or the tensors that a quantizer's weight is made of.

    None on the meta device, and none that are empty.
    """
    if weight.is_meta:
        return []
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if is_traceable_wrapper_subclass(weight.data):
        parts = [getattr(weight.data, name) for name in weight.data.__tensor_flatten__()[0]]
    else:
        parts = [weight.detach()]
    return [part for part in parts if part.numel()]


def function_hash(function: Any) -> str:
    """A function's name, and the start of a SHA-256 of its bytecode, constants, defaults and closure.

    For a partial: of the function and its arguments; for other callables: of the type, the code of its call and its
    attributes.
    """
    digest = hashlib.sha256()
    _update(digest, function, depth=0)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {digest.hexdigest()[:16]}"


def _update(digest: Any, value: Any, depth: int) -> None:
    """Add a value to a hash such that it is the same in another process: no ids, no addresses, no order of sets."""
    if depth > MAX_DEPTH:
        digest.update(b"deeper")
    elif isinstance(value, types.CodeType):
        # Bytecode and names only: with line numbers, moving a function would change its hash.
        digest.update(value.co_code + repr((value.co_names, value.co_varnames)).encode())
        _update(digest, value.co_consts, depth + 1)
    elif isinstance(value, functools.partial):
        _update(digest, (value.func, value.args, value.keywords), depth + 1)
    elif isinstance(value, types.MethodType):
        _update(digest, (value.__func__, value.__self__), depth + 1)
    elif isinstance(value, types.FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        _update(digest, (value.__code__, value.__defaults__, value.__kwdefaults__, cells), depth + 1)
    elif isinstance(value, set | frozenset):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, dict):
        _update(digest, tuple(sorted(value.items(), key=lambda item: repr(item[0]))), depth + 1)
    elif isinstance(value, tuple | list):
        digest.update(f"{type(value).__name__} of {len(value)}".encode())
        for item in value:
            _update(digest, item, depth + 1)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, str | int | float | bool | bytes | None):
        digest.update(repr(value).encode())
    else:
        _update_object(digest, value, depth)


def _update_object(digest: Any, value: Any, depth: int) -> None:
    """Add an object: its type, the code of its `forward` and `__call__`, and its attributes of simple types."""
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
        return  # a model: `weights_hash` covers the one that is initialized, and others count by their type only
    for name in ("forward", "__call__"):
        method = getattr(type(value), name, None)
        # torch's own methods are covered by its version.
        if isinstance(method, types.FunctionType) and method.__module__.partition(".")[0] != "torch":
            _update(digest, method, depth + 1)
    attributes = (
        {key: item for key, item in vars(value).items() if isinstance(item, HASHED_TYPES)}
        if hasattr(value, "__dict__")
        else {}
    )
    _update(digest, attributes, depth + 1)
