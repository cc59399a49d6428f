"""Which layers `--target-modules` names, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

import lorasb
from lorasb.app import adapter
from lorasb.app.prepare import prepare
from lorasb.app.settings import Settings
from lorasb.init.plan import warmup_steps
from lorasb.layers.lookup import layers_with


class Reversed(set[str]):
    """A set in an order that `set` may have in another process."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__(), reverse=True))


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*layers\.[01]\..*proj", r".*layers\.[01]\..*proj"),
    ],
)
def test_a_list_a_pattern_or_all_linear_layers(said: str | None, want: Any) -> None:
    assert adapter.targets(said) == want


def test_an_adapter_is_the_same_bytes_whatever_the_order_of_its_sets(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("up", "down", "gate")})
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up", "down", "gate"]))
    config = adapted.peft_config["default"]
    config.target_modules = Reversed(config.target_modules)
    adapter.save_adapter(SimpleNamespace(model=adapted), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down", "gate", "up"]
    again: Any = peft.PeftModel.from_pretrained(
        torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in model}), tmp_path
    )
    assert set(again.peft_config["default"].target_modules) == {"up", "down", "gate"}


@pytest.mark.parametrize(
    ("given", "start", "lr"),
    [
        ({}, 4.0, 5e-3 / 2),
        ({"start": "paper"}, None, 5e-3 / 2),
        ({"start": "zero"}, 0.0, 5e-3 / 2),
        ({"eta": 1e-4}, 4.0, 1e-4),
        ({"start": "paper", "eta": 1e-4}, None, 1e-4),
    ],
)
def test_the_start_and_its_rate_are_those_that_were_asked_for(
    base: Settings, given: dict[str, Any], start: float | None, lr: float
) -> None:
    run = prepare(replace(base, **given))
    assert run.warmup_steps == 2
    adapter.adapt(run)
    facts = run.model.peft_config["default"].init_provenance
    assert facts["longest_start"] == start
    assert facts["lr"] == pytest.approx(lr)
    norms = [float(layer.lorasb_R["default"].detach().norm()) for layer in layers_with(run.model, "default").values()]
    assert (max(norms) == 0.0) == (start == 0.0)


@pytest.mark.parametrize("steps", [1, 3, 9, 10, 11, 125, 312])
@pytest.mark.parametrize("share", [0.02, 0.06, 0.1])
def test_warm_up_is_rounded_as_trainer_rounds_it(steps: int, share: float) -> None:
    """31 steps here and 32 there would give η two values."""
    arguments = transformers.TrainingArguments("unused", warmup_steps=share, use_cpu=True, report_to="none")
    found = warmup_steps(share, steps)
    assert found == arguments.get_warmup_steps(steps)
    assert lorasb.first_step_lr(1.0, share, steps) == 1.0 / max(1, found)
