"""What an adapter file must hold: checks with messages, and reading one without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..constants import CONFIG_NAME, FACTORS, PEFT_NAME, PEFT_PREFIX, WEIGHTS_NAME
from ..utils.atomic_files import safetensors_header
from ..utils.dtypes import FLOATS, WIDE
from .shared_factors import DIGEST, joined, missing

Shapes = dict[str, tuple[int, ...]]


def check_tensors(tensors: dict[str, Tensor], layers: dict[str, Shapes]) -> None:
    """Check that a state dict holds exactly the factors of `layers` (layer name -> factor -> shape).

    Raises:
        ValueError: a factor is missing, unexpected, of another shape or no floating-point number.
    """
    found = group_by_layer(tensors)
    if not found and any(".lora_A" in key for key in tensors):
        raise ValueError(
            "this file holds a plain LoRA (lora_A, lora_B) but its configuration says LORASB: it has no R. "
            "Load it with peft_type LORA, or point at the LoRA-SB adapter it was exported from"
        )
    for name, shapes in layers.items():
        for part, shape in shapes.items():
            tensor = found.get(name, {}).get(part)
            if tensor is None:
                raise ValueError(
                    f"the adapter file has no {part} for layer {name!r}: it belongs to another model or was cut short. "
                    f"It holds {len(found)} layers, this model has {len(layers)}"
                )
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{part} of layer {name!r} is {list(tensor.shape)} in the adapter file, expected {list(shape)}: "
                    "the file belongs to another base model, or its adapter_config.json was changed"
                )
            _check_values(name, part, tensor)
    extra = sorted(set(found) - set(layers))
    if extra:
        raise ValueError(f"the adapter file has layers that this model does not adapt: {', '.join(extra[:3])}, ...")


def _check_values(name: str, part: str, tensor: Tensor) -> None:
    allowed = WIDE if part == "lorasb_R" else FLOATS
    if tensor.dtype not in allowed:
        expected = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{part} of layer {name!r} is {tensor.dtype} in the adapter file, expected one of {expected}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{part} of layer {name!r} has NaN or Inf values in the adapter file: its training had failed")


def group_by_layer(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """layer name -> {"lorasb_A": ..., "lorasb_R": ..., "lorasb_B": ...}; other entries are left out."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        for part in FACTORS:
            name, found, _ = key.removeprefix(PEFT_PREFIX).rpartition(f".{part}")
            if found:
                layers.setdefault(name, {})[part] = value
    return layers


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter_config.json of a LoRA-SB adapter folder.

    Raises:
        ValueError: there is none, or it is another method's.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"expected an adapter folder with {CONFIG_NAME}, found none in {path}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if config.get("peft_type") != PEFT_NAME:
        raise ValueError(f"{path} holds an adapter of type {config.get('peft_type')!r}, expected {PEFT_NAME!r}")
    return config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an adapter folder, after a check that the file is whole.

    Raises:
        ValueError: no weights, truncated weights, or no LoRA-SB factors in them.
    """
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"expected {WEIGHTS_NAME} in {path}, found none")
    safetensors_header(file)
    tensors = joined(load_file(str(file)), Path(path))
    if DIGEST in tensors:
        raise missing(path)
    for name, parts in group_by_layer(tensors).items():
        if set(parts) != set(FACTORS):
            raise ValueError(f"layer {name!r} has {', '.join(sorted(parts))} in {file}, expected {', '.join(FACTORS)}")
    if not group_by_layer(tensors):
        raise ValueError(f"{file} holds no LoRA-SB factors ({', '.join(FACTORS)})")
    return tensors
