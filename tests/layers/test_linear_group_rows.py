"""q/k/v and gate/up in one call where each row of the batch has an adapter of its own, and when they stay alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tolerances
import torch
from basis_models import fill, with_users
from linear_groups import alone, groups, prepared
from models import batches_for
from torch import Tensor, nn

import lorasb
from lorasb.kernels.launcher import observed
from lorasb.layers import linear

pytestmark = pytest.mark.usefixtures("grouped")

NAMES = ["default", "one", "__base__", "two"]


def step(model: Any, names: list[str] = NAMES, backend: str = "eager") -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of every R, of a batch with these adapters."""
    model.zero_grad()
    with lorasb.backend(backend):
        out = model(**batches_for("llama", count=1, rows=len(names))[0], adapter_names=names)
        out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


def trained_by_row() -> Any:
    model = with_users("one", "two", target_modules="all-linear")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lorasb_R" in name)
    return model


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_values_and_gradients_are_those_of_the_layers_alone(backend: str) -> None:
    model = trained_by_row()
    (logits, grads), (want, want_grads) = step(model, backend=backend), step(alone(model), backend=backend)
    tolerances.check(logits, want, tolerances.PROCESS_SUMS)
    assert grads.keys() == want_grads.keys()
    assert len(grads) == 2 * 7 * 3
    for name, grad in grads.items():
        tolerances.check(grad, want_grads[name], tolerances.PROCESS_SUMS)
    assert [len(group.members) for group in groups(model)] == [3, 2] * 2


def launches_of(model: nn.Module, names: list[str] = NAMES) -> Counter[str]:
    ids = torch.randint(3, 99, (len(names), 3))
    with torch.no_grad(), lorasb.backend("triton"), observed() as launches:
        model(input_ids=ids, adapter_names=names)
    return Counter(one.name for one in launches)


def test_a_bank_s_rows_are_grouped_too() -> None:
    model = with_users(target_modules="all-linear")
    bank = lorasb.AdapterBank(model)
    for name in ("one", "two"):
        bank.add(name, {n: torch.randn_like(layer.lorasb_R["default"]) for n, layer in bank.layers.items()})
    names = ["one", "__base__", "two", "one"]
    assert launches_of(model, names) == {"prep_forward": 8, "extended_gemm": 8, "times_row_cores": 14}
    assert launches_of(alone(model), names) == {"prep_forward": 14, "extended_gemm": 14, "times_row_cores": 14}


def test_what_is_computed_in_several_calls_stays_alone() -> None:
    model = with_users("one", "two", target_modules="all-linear")
    assert launches_of(model)["extended_gemm"] == 8
    model.add_adapter("apart", lorasb.LoRASBConfig(r=3, target_modules="all-linear", init="kaiming"))
    assert not launches_of(model, ["one", "apart", "two", "one"])["times_row_cores"]  # one adapter after the other
    model.base_model.model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *_: None)
    assert launches_of(model)["extended_gemm"] == 9


class Several(nn.Module):
    """Siblings that are told their rows by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, first: list[str], second: list[str]) -> Tensor:
        return self.gate_proj(x, adapter_names=first) + self.up_proj(x, adapter_names=second)


def several() -> nn.Module:
    model: Any = prepared(Several(), 16)
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(name, lorasb.LoRASBConfig(basis="default"))
        fill(model, name, seed)
    return model.base_model.model


def test_members_with_other_rows_are_computed_with_theirs() -> None:
    model, x = several(), torch.randn(3, 16)
    same, other = ["one", "two", "default"], ["two", "two", "one"]
    for second, sizes in ((same, [2]), (other, [])):
        want = alone(model)(x, same, second)
        tolerances.check(model(x, same, second), want, tolerances.fp32(16))
        assert [len(group.members) for group in groups(model)] == sizes


def test_an_r_that_is_written_to_between_members_is_read_again() -> None:
    model, x, names = several(), torch.randn(3, 16), ["one", "two", "default"]

    def change(module: nn.Module, *_: Any) -> None:
        module.lorasb_R["two"].data.mul_(1.0).add_(0.0)
        with torch.no_grad():
            module.lorasb_R["two"].mul_(2.0)

    model.gate_proj(x, adapter_names=names)
    first = model.gate_proj.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        y = first(*args, **kwargs)
        change(model.up_proj)
        return y

    model.gate_proj.forward = forward
    y = model(x, names, names)
    model.gate_proj.forward = first
    tolerances.check(y, alone(model)(x, names, names), tolerances.fp32(16))


def test_one_that_is_not_initialized_raises_where_it_would_be_trained() -> None:
    model: Any = lorasb.patch(Several(), r=3, target_modules="all-linear").train()
    x = torch.randn(2, 16)
    layer = model.base_model.model.gate_proj
    model.add_adapter("one", lorasb.LoRASBConfig(r=3, target_modules="all-linear"))
    layer.lorasb_A["one"], layer.lorasb_B["one"] = layer.lorasb_A["default"], layer.lorasb_B["default"]
    assert linear.on_one_basis(layer, ["default", "one"])
    with pytest.raises(RuntimeError, match="has not been initialized"):
        model.base_model.model(x, ["default", "one"], ["default", "one"])
