"""Private names of other packages: the installed versions have them, and without one the results are the same."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from linear_groups import same, step
from models import make, patched
from torch import nn

import lorasb
from lorasb import compat
from lorasb.compat import Private
from lorasb.compat import peft as private_peft
from lorasb.compat import torch as private_torch

MODULES = (private_torch, private_peft)
NAMES = [(module, name) for module in MODULES for name in module.PRIVATE]
GONE = object()
FALLBACKS = {name: one.fallback for name, one in private_torch.PRIVATE.items() if one.fallback is not None}


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda one: getattr(one, "__name__", one))
def test_the_installed_version_has_the_name(module: ModuleType, name: str) -> None:
    assert compat.find(module.PRIVATE[name]._replace(fallback=GONE)) is not GONE


@pytest.mark.parametrize("name", ["no_such_package.name", "torch.no_such_module.name", "torch._C._no_such_name"])
def test_a_name_that_is_gone_gives_the_fallback(name: str) -> None:
    assert compat.find(Private(name, "", "", GONE)) is GONE


@pytest.mark.parametrize("name", FALLBACKS)
def test_without_the_name_a_model_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("llama")
    expected = step(model)
    monkeypatch.setattr(private_torch, name, FALLBACKS[name])
    same(step(model), expected)


@pytest.mark.parametrize("name", FALLBACKS)
def test_without_the_name_gradients_are_off_and_rows_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lorasb.LoRASBLinear(nn.Linear(24, 16), "one", r=4)
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        layer.lorasb_R["one"].normal_()
        layer.set_factors("one", torch.randn(16, 4), torch.randn(4, 4), torch.randn(4, 24))
        expected = layer(x), layer(x, adapter_names=["one", "__base__", "one"])
        monkeypatch.setattr(private_torch, name, FALLBACKS[name])
        for got, want in zip((layer(x), layer(x, adapter_names=["one", "__base__", "one"])), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_without_fake_tensors_the_planner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_torch, "find", lambda private: private.fallback)
    with pytest.raises(ImportError, match=r"expected .*FakeTensorMode, which this torch lacks: install torch"):
        private_torch.fake_tensor_mode()


def test_without_forward_mode_there_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_torch, "forward_ad", object())
    assert private_torch.forward_level() == -1


def test_without_pefts_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, one in private_peft.PRIVATE.items():
        monkeypatch.setattr(private_peft, name, one.fallback)
    assert private_peft.in_out_features(nn.Linear(3, 5)) == (3, 5)
    expected: Any = {"q_proj", "v_proj"}
    assert lorasb.patch(make("llama"), r=4, target_modules=expected).peft_config["default"].r == 4
    with pytest.raises(ValueError, match="name the modules"):
        lorasb.patch(make("llama"), r=4, target_modules="all-linear")
