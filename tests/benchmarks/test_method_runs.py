"""Every method of the comparison on a tiny model: the same batches, the same function before training, only its own
parameters trained. LoRA-Pro is tested where it is installed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from models import make, text
from torch import Tensor, nn

from benchmarks.research.methods import run
from benchmarks.research.methods.adapters import optimizer, put_in
from benchmarks.research.methods.grid import FULL, METHODS, TASKS, Cell
from benchmarks.research.methods.problems import LINEARS, Problem

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's LoRA-GA
TASK = replace(TASKS["chain_sum"], steps=3, batch=2)
SAME = [name for name in METHODS if not name.startswith("LoRA-SB")]  # LoRA-SB's R starts at the first step


def problem(seen: list[Any]) -> Problem:
    """Rows of a tiny Llama; `seen` gets what is collated."""
    rows = text(40, 12, seed=5)

    def collate(indices: Any) -> dict[str, Tensor]:
        seen.append(tuple(indices))
        return {key: value[list(indices)] for key, value in rows.items()}

    return Problem(
        make("llama"), list(range(40)), collate, lambda *_: (0.0, 0.0), lambda *_: 0.0, LINEARS, [], "CAUSAL_LM"
    )


def put(name: str, seen: list[Any]) -> tuple[Problem, Cell, nn.Module]:
    if name == "LoRA-Pro":
        pytest.importorskip("lora_pro")
    one, method = problem(seen), METHODS[name]
    cell = Cell(TASK.name, "test", name, 0 if method.family == FULL else 4, 1e-3, 0)
    model, _, _ = put_in(one, method, cell, lambda n: run.drawn(one, TASK, 0, n), 1)
    return one, cell, model


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_is_its_own_on_the_same_batches(name: str) -> None:
    seen: list[Any] = []
    one, cell, model = put(name, seen)
    assert all(p.grad is None for p in model.parameters())  # an initialization leaves none behind
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    seen.clear()
    losses = run.train(model, one, TASK, cell, 1)
    order = list(range(40))
    random.Random(cell.seed).shuffle(order)
    assert seen == [tuple(order[:2]), tuple(order[2:4]), tuple(order[4:6])]
    assert len(losses) == TASK.steps
    assert all(loss == loss for loss in losses)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    own = "weight" if name == "full" else "lorasb_R" if name.startswith(("LoRA-SB", "LoRA-XS")) else "lora_"
    assert moved
    assert all(own in key for key in moved)


@pytest.mark.parametrize("name", SAME)
def test_a_method_starts_from_the_base_models_function(name: str) -> None:
    """PiSSA and LoRA-GA take out of the base weight what their factors put in."""
    batch = text(2, 12, seed=5)
    with torch.no_grad():
        plain = make("llama")(**batch).logits
        _, _, model = put(name, [])
        tolerances.check(model.eval()(**batch).logits, plain, tolerances.fp32(4096))


@pytest.mark.parametrize("name", ["LoRA", "LoRA-Pro", "LoRA-SB", "full"])
def test_a_head_has_its_own_rate(name: str) -> None:
    if name == "LoRA-Pro":
        pytest.importorskip("lora_pro")
    _, cell, model = put(name, [])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".norm." in key)
    task = replace(TASK, head_lr=0.125)
    opt = optimizer(model, METHODS[name], task, cell, ["norm"])
    rates = {id(p): group["lr"] for group in opt.param_groups for p in group["params"]}
    found = {key: rates[id(p)] for key, p in model.named_parameters() if p.requires_grad}
    assert {rate for key, rate in found.items() if ".norm." in key} == {0.125}
    assert {rate for key, rate in found.items() if ".norm." not in key} == {cell.lr}


def test_batches_of_like_length_leave_no_example_out() -> None:
    one = problem([])
    plain = run.epoch(one, 2, random.Random(3))
    one.lengths = lengths = [10 + 7 * i % 13 for i in one.train]
    grouped = run.epoch(one, 2, random.Random(3))
    for batches in (plain, grouped):
        assert sorted(i for batch in batches for i in batch) == one.train
    assert grouped != run.epoch(one, 2, random.Random(4))

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)

    assert padding(grouped) < padding(plain) / 2
