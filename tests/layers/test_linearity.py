"""What is adapted as a linear has to be one: one probe when the model is patched, x and 2x, and the gradient of x."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from models import llama
from opaque_models import Scaled
from tolerances import EXACT, check
from torch import nn

import lorasb
from lorasb.layers import base
from lorasb.layers.linear import LoRASBLinear


class Bent(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(super().forward(x))


class Cut(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class Broken(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bent, r"'proj' is a Bent, and 2x does not give twice what x gives"),
        (Cut, r"'proj', a Cut layer, has no gradient of its input"),
        (Broken, r"'proj' is a Broken that failed on x \[3, in\] \(no such kernel\), or name it in exclude_modules"),
    ],
)
def test_one_probe_finds_what_cannot_be_adapted(kind: type[nn.Module], message: str) -> None:
    model = nn.Sequential()
    model.proj = kind(nn.Linear(8, 6, bias=False))
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=message):
        lorasb.patch(model, r=2, target_modules=["proj"], init="random")
    assert type(model.proj) is kind
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_gradient_an_adapter_can_still_be_served() -> None:
    model = nn.Sequential()
    model.proj = Cut(nn.Linear(8, 6, bias=False))
    adapter = lorasb.patch(model, r=2, target_modules=["proj"], init="random", inference_mode=True)
    assert isinstance(adapter.base_model.model.proj, LoRASBLinear)


def test_a_missing_package_is_named() -> None:
    kind = type("EetqLinear", (Broken,), {})
    model = nn.Sequential()
    model.proj = kind(nn.Linear(8, 6, bias=False))
    with pytest.raises(TypeError, match="pip install eetq"):
        lorasb.patch(model, r=2, target_modules=["proj"])


def test_affine_is_linear_and_dense_layers_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Affine(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 3

    model = nn.Sequential()
    model.proj = Affine(nn.Linear(8, 6, bias=False))
    assert lorasb.patch(model, r=2, target_modules=["proj"], init="random")
    asked = []
    monkeypatch.setattr(base, "resolve_quantization_backend", lambda *_, **__: asked.append(1))
    lorasb.patch(llama(), r=4)
    assert not asked


def test_an_opaque_base_is_compiled_with_its_adapter() -> None:
    model = nn.Sequential(Scaled(nn.Linear(8, 6, bias=False)))
    adapted = lorasb.patch(model, r=2, target_modules=["0"], init="random")
    adapted.base_model.model[0].lorasb_R["default"].data.copy_(torch.eye(2))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    check(compiled(x), adapted(x), EXACT)
    assert not torch.equal(adapted(x), model[0].base_layer(x))


def test_a_resolver_that_finds_a_package_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        raise ImportError("torchao 0.1 is too old, only versions above 0.16 are supported")

    monkeypatch.setattr(peft.utils.quantization_utils, "is_torchao_available", too_old)
    model = nn.Sequential()
    model.proj = Scaled(nn.Linear(8, 6, bias=False))
    with pytest.raises(ImportError, match=re.escape("torchao 0.1 is too old")):
        lorasb.patch(model, r=2, target_modules=["proj"])
    assert type(model.proj) is Scaled
