"""`lorasb.optim.Muon`: its steps are orthogonal, those of torch's Muon, the same for every rank, and resume to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batches_for, make
from torch import Tensor, nn

import lorasb
from lorasb.optim import Muon, orthogonalize

FEW_BITS = 5e-2  # torch orthogonalizes in bf16, and a small singular value grows 480-fold in five iterations


def matrices(count: int, r: int, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(r, r, generator=generator)) for _ in range(count)]
    for parameter in found:
        parameter.grad = torch.randn(r, r, generator=generator)
    return found


@settings(max_examples=40)
@given(r=st.integers(1, 24), count=st.integers(1, 4), seed=st.integers(0, 10_000), exponent=st.integers(-14, 80))
def test_singular_values_come_near_one_and_vectors_stay(r: int, count: int, seed: int, exponent: int) -> None:
    """Of matrices with a condition number up to 100, of any scale: the iterations fix the direction, not the size."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(count, r, r, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = 10 ** (-2 * torch.rand(count, r, generator=generator, dtype=torch.float64))
    found = orthogonalize((2.0**exponent * (u * values[:, None]) @ v.mT).float()).double()
    inner = u.mT @ found @ v
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.4).all()
    assert (diagonal < 1.3).all()
    tolerances.check(inner - torch.diag_embed(diagonal), torch.zeros_like(inner), tolerances.fp32(1000))


def test_no_gradient_no_step() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 5, 5)), torch.zeros(2, 5, 5))
    for scale in (1e-12, 1e-23, 1e-40):  # squares of the latter two are zero in fp32
        assert 0 <= float(orthogonalize(torch.full((1, 5, 5), scale)).norm()) < 0.1


def test_momentum_that_fades_moves_less_and_less() -> None:
    """Gradients of zeros, as of an expert that no token reaches: R comes to rest, and stays finite."""
    (parameter,) = matrices(1, 4)
    optimizer = Muon([parameter], lr=0.02)
    optimizer.step()
    parameter.grad = torch.zeros(4, 4)
    for _ in range(1500):
        before = parameter.detach().clone()
        optimizer.step()
    assert parameter.isfinite().all()
    assert float((parameter - before).detach().norm()) < 1e-6


def test_names_may_come_with_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    assert len(Muon(model.named_parameters()).param_groups[0]["params"]) == 2


def test_a_state_of_adamw_gets_what_it_lacks() -> None:
    (parameter,) = matrices(1, 4)
    other = torch.optim.AdamW([{"params": [parameter], "name": "lorasb_R"}])
    optimizer = Muon([{"params": [parameter], "name": "lorasb_R"}])
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()
    assert optimizer.param_groups[0]["algorithm"] == "muon"


def test_a_group_that_is_refused_is_not_there() -> None:
    optimizer = Muon(matrices(1, 4))
    with pytest.raises(ValueError, match="Muon steps matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    assert len(optimizer.param_groups) == 1


def test_nothing_moves_without_a_gradient() -> None:
    (parameter,) = matrices(1, 4)
    before, parameter.grad = parameter.detach().clone(), None
    Muon([parameter]).step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("r", [3, 16, 64])
def test_steps_are_those_of_torchs_muon(r: int) -> None:
    """Which takes bf16 matrices one by one, and a momentum of another scale that orthogonalization removes."""
    ours, theirs = matrices(3, r), matrices(3, r)
    mine = Muon(ours, lr=0.1, momentum=0.9)
    other = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.0)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(r, r, generator=torch.Generator().manual_seed(10 * step + r))
            b.grad = a.grad.clone()
        before = [parameter.detach().clone() for parameter in ours]
        mine.step()
        other.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            moved, same = (a - old).detach(), (b - old).detach()
            assert float((moved - same).norm() / same.norm()) < FEW_BITS * (step + 1)


def test_a_step_has_one_length_whatever_the_rank_and_the_gradient() -> None:
    for r, scale in ((4, 1e-6), (16, 1.0), (96, 1e4)):
        (parameter,) = matrices(1, r)
        before, parameter.grad = parameter.detach().clone(), parameter.grad * scale
        Muon([parameter], lr=0.02).step()
        longest = float(torch.linalg.matrix_norm((parameter - before).detach(), 2))
        assert 0.02 * 0.6 < longest < 0.02 * 1.3


def test_matrices_of_several_sizes_step_as_each_would_alone() -> None:
    together = [*matrices(2, 4), *matrices(3, 8, seed=1)]
    alone = copy.deepcopy(together)
    for a, b in zip(together, alone, strict=True):
        b.grad = a.grad.clone()
        Muon([b], lr=0.1).step()
    Muon(together, lr=0.1).step()
    for a, b in zip(together, alone, strict=True):
        tolerances.check(a, b.double(), tolerances.fp32(10))


def trained(model: Any, optimizer: Muon, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def started() -> tuple[Any, Muon]:
    """A patched classifier: R takes Muon's steps, its head AdamW's."""
    model = lorasb.patch(make("roberta"), r=4)
    lorasb.initialize(model, batches_for("roberta"), lr=1e-3, progress=False)
    return model.eval(), Muon(lorasb.parameter_groups(model, lr=2e-2, other_lr=1e-3, weight_decay=0.1))


def test_a_head_takes_adamws_steps() -> None:
    (model, optimizer), (other, _) = started(), started()
    groups = lorasb.parameter_groups(other, lr=2e-2, other_lr=1e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW([group for group in groups if group["name"] != "lorasb_R"])
    batches = batches_for("roberta")[:1]
    trained(model, optimizer, batches)
    other(**batches[0]).loss.backward()
    adamw.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad and "lorasb_R" not in name]
    assert names
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in names:
            assert torch.equal(parameter, theirs[name]), name
    assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    batches = [batch for _ in range(3) for batch in batches_for("roberta")]
    model, optimizer = started()
    trained(model, optimizer, batches)
    first, before = started()
    trained(first, before, batches[: len(batches) // 2])
    state = copy.deepcopy((first.state_dict(), before.state_dict()))
    second, after = started()
    second.load_state_dict(state[0])
    after.load_state_dict(state[1])
    trained(second, after, batches[len(batches) // 2 :])
    whole = dict(model.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_schedulers_move_both_rates() -> None:
    _, optimizer = started()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"lorasb_R": 1e-2, "other": 5e-4, "other, not decayed": 5e-4}
    )


def test_a_closure_is_called_with_gradients() -> None:
    (parameter,) = matrices(1, 4)
    optimizer = Muon([parameter], lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert float(closure().detach()) < float(first.detach())


BIAS = nn.Parameter(torch.zeros(7))


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        (matrices(1, 4), {"lr": -1.0}, "expected lr >= 0"),
        (matrices(1, 4), {"momentum": 1.0}, r"expected momentum in \[0, 1\)"),
        (matrices(1, 4), {"weight_decay": -0.1}, "expected weight_decay >= 0"),
        ([BIAS], {}, r"Muon steps matrices, got a parameter of shape \[7\]: leave it to AdamW"),
        ([{"params": matrices(1, 4), "algorithm": "lion"}], {}, "algorithm to be muon or adamw, got 'lion'"),
    ],
    ids=["lr", "momentum", "weight decay", "shape", "algorithm"],
)
def test_wrong_arguments_are_refused(parameters: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(parameters, **options)


def test_a_named_head_is_adamws() -> None:
    assert Muon([{"params": [BIAS], "name": "head"}]).param_groups[0]["algorithm"] == "adamw"
