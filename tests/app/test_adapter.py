"""What of a model is adapted, where R starts, and the rate of training, which trials may find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers

import lorasb
from lorasb.app import adapter, finetune, train
from lorasb.app.finetune import run_finetune
from lorasb.app.prepare import prepare, save_adapter
from lorasb.app.settings import Settings
from lorasb.init.auto_rate import warmup_steps
from lorasb.layers.lookup import layers_with


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
    """A set may have any order in another process."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "fedcba"})
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(model)))
    assert isinstance(adapted.peft_config["default"].target_modules, set)
    run: Any = SimpleNamespace(model=adapted, adapters=[], settings=SimpleNamespace(basis=None))
    save_adapter(run, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == list("abcdef")


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


@pytest.mark.parametrize("method", ["lora-sb", "lora"])
def test_a_run_trains_at_the_rate_that_it_found(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: Any, method: str
) -> None:
    search = Mock(wraps=finetune.find_rate)
    monkeypatch.setattr(finetune, "find_rate", search)
    settings = replace(base, method=method, lr=1e-3, find_lr=True, epochs=1.0)
    found = goes_on(settings, 4)
    assert search.call_count == 2  # of two runs: the stopped one has its rate with its start
    assert found["lr"] > 1e-3  # far too low for this task
    assert found["config"]["lr"] == 1e-3  # so that config.yaml repeats the run
    # R's start is scaled: a run that is given the rate begins at the same start
    told = run_finetune(replace(settings, lr=found["lr"], find_lr=False, output=str(tmp_path / "told"))).summary
    assert found["train_losses"] == pytest.approx(told["train_losses"], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_trials_take_the_runs_own_batches(base: Settings, packing: bool) -> None:
    run = prepare(replace(base, packing=packing, max_length=16, gradient_accumulation=2))
    run.model = lorasb.patch(run.model, r=4)
    batches = train.batches(run)
    first = [next(batches) for _ in range(40)]  # more than an epoch
    assert max(len(batch["input_ids"]) for batch in first) == base.batch_size // 2
    assert ("attention_mask" not in first[0]) == packing  # packs are told apart by their positions
