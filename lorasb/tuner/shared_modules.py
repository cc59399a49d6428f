"""Modules that a model has in several places, as T5 its embedding: replacing one means replacing it in each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Place = tuple[nn.Module, str]  # an owner, and the child's name in it


def places_of_shared(model: nn.Module) -> dict[nn.Module, list[Place]]:
    """The places of every module that has more than one; one pass, as models of experts have thousands of targets."""
    places: dict[nn.Module, list[Place]] = {}
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is not None:
                places.setdefault(child, []).append((owner, name))
    return {child: found for child, found in places.items() if len(found) > 1}


@contextmanager
def places_known(tuner: Any) -> Iterator[None]:
    """Give a tuner the places of its model's shared modules, as `shared`, while PEFT replaces modules one by one."""
    tuner.shared = places_of_shared(tuner.model)
    try:
        yield
    finally:
        tuner.shared = {}
