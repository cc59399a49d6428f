"""Merging where the base's weight is not its own, and under autocast."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import tolerances
import torch
from torch import nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():  # it is deprecated, and in models all the same
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, old_weight_norm], ids=["new", "old"])
def test_a_weight_that_is_computed_is_adapted_and_not_merged(norm: Callable[[nn.Linear], nn.Module]) -> None:
    net = nn.Sequential(OrderedDict(normed=norm(nn.Linear(16, 12)), plain=nn.Linear(12, 8)))
    model = lorasb.patch(net, r=4, init="kaiming", target_modules=["normed", "plain"])
    for layer in (m for m in model.modules() if isinstance(m, LoRASBLinear)):
        layer.lorasb_R["default"].data.fill_(0.5)
    x = torch.randn(3, 16)
    before = model(x)
    with model.disable_adapter():
        assert (model(x) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"computes its weight in every forward .* remove that first"):
        model.merge_adapter()
    tolerances.check(model(x), before, tolerances.EXACT)


def test_unmerging_under_autocast_gives_the_weight_back() -> None:
    torch.manual_seed(0)
    layer = LoRASBLinear(nn.Linear(64, 48), "default", 8)
    layer.set_factors("default", *(0.3 * torch.randn(shape) for shape in ((48, 8), (8, 8), (8, 64))))
    weight = layer.base.parameter().detach().clone()
    layer.merge()
    layer.enable_adapters(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 64))
    assert not layer.merged
    tolerances.check(layer.base.parameter(), weight, tolerances.fp32(64))
