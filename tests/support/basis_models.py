"""A tiny Llama with an adapter "default", and others on its A and B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import llama, logits
from torch import Tensor, nn

import lorasb
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with


def base() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(3)
    return llama()


def with_basis(**options: Any) -> Any:
    """A model whose adapter "default" is initialized."""
    return lorasb.patch(base(), **{"r": 4, "init": "kaiming"} | options).eval()


def fill(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter's R random values."""
    g = torch.Generator().manual_seed(seed)
    for layer in layers_with(model, name).values():
        layer.lorasb_R[name].data.normal_(std=0.3, generator=g)


def with_users(*names: str, **options: Any) -> Any:
    """The same with adapters on the basis, each with an R of its own."""
    model = with_basis(**options)
    for seed, name in enumerate(names):
        model.add_adapter(name, lorasb.LoRASBConfig(basis="default"))
        fill(model, name, seed)
    return model


def saved(folder: Path, *names: str) -> Any:
    """The model, and a folder of the adapters: "default" itself and a subfolder for each other one."""
    model = with_users(*names)
    model.save_pretrained(folder)
    return model


def answer(model: Any, name: str) -> Tensor:
    """The logits of a fixed batch by one adapter."""
    model.set_adapter(name)
    return logits(model.eval())


def a_layer(model: nn.Module, name: str = "default") -> LoRASBLinear:
    """One of its layers."""
    return next(iter(layers_with(model, name).values()))
