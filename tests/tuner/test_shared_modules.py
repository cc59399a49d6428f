"""Modules are replaced in all of their places, and the model is not walked once more for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import lorasb


class Chain(nn.Module):
    """Linears one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))


def walks(depth: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often patching and unloading start to go through all modules of a model of `depth` targets."""
    net, count, original = Chain(depth), 0, nn.Module.named_modules

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        nonlocal count
        count += module is net
        return original(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", counted)
        model = lorasb.patch(net, r=2, target_modules=r"blocks\.\d+", init="random")
        patched = count
        model.unload()
    assert all(type(block) is nn.Linear for block in net.blocks)
    return [patched, count - patched]


def test_the_walks_over_a_model_do_not_grow_with_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of experts have thousands of targets."""
    few = walks(3, monkeypatch)
    assert min(few) > 0
    assert walks(30, monkeypatch) == few
