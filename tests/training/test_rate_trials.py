"""Learning-rate trials: they train as an independent loop does, and the model keeps nothing of them."""

import contextlib
import copy
import functools
import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import make, text
from peft import PeftModel
from tolerances import check_equal
from torch import Tensor, nn

import lorasb
from lorasb.training import rate_trials
from lorasb.training.rate_trials import CLIP, FARTHEST, RAMP, _search


def batches(count: int, rows: int = 2) -> list[dict[str, Tensor]]:
    data = text(rows * count, 12, seed=5)
    return [{key: value[rows * i : rows * (i + 1)] for key, value in data.items()} for i in range(count)]


@functools.cache
def _patched(dropout: float) -> PeftModel:
    torch.manual_seed(0)
    model = lorasb.patch(make("llama").double(), r=4, lora_dropout=dropout)
    lorasb.initialize(model, batches(4), lr=1e-3, progress=False)
    return model


def patched(dropout: float = 0.0) -> PeftModel:
    return copy.deepcopy(_patched(dropout))


def find(model: nn.Module, given: object = None, lr: float = 1e-3, **options: object) -> lorasb.RateTrials:
    usual = {"steps": 6, "judged": 2, "progress": False}
    return lorasb.find_lr(model, batches(8) if given is None else given, lr, **usual | options)


def cores(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(model: PeftModel, lr: float, first: float, steps: int, judged: int) -> float:
    """Loss of a trial, run as a plain loop on a copy."""
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = batches(steps + judged)
    with torch.no_grad():
        for p in trained:
            p *= lr / first
    opt = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for k, batch in enumerate(held[judged:]):
        opt.param_groups[0]["lr"] = lr * min(1.0, (k + 1) / round(RAMP * steps))
        opt.zero_grad()
        model.train()(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        opt.step()
    with torch.no_grad():
        return sum(float(model.eval()(**batch).loss) for batch in held[:judged]) / judged


def test_a_trial_is_a_plain_training_loop() -> None:
    model = patched()
    expected = {rate: by_hand(model, rate, 1e-3, 6, 2) for rate in (1e-3, 2e-3, 4e-3)}
    found = find(model)
    assert {1e-3, 2e-3} <= found.losses.keys()
    for rate in expected.keys() & found.losses.keys():
        assert found.losses[rate] == pytest.approx(expected[rate], rel=1e-9)
    assert found.losses[found.lr] == min(found.losses.values())


def test_nothing_of_the_trials_stays_but_the_length_of_the_start() -> None:
    """Also with a loader that shuffles by the global random state."""
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(16, rows=1)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    model = patched(dropout=0.3).train()
    some = next(module for module in model.modules() if isinstance(module, nn.Linear))
    some.eval()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before, state, modes = cores(model), torch.get_rng_state(), [m.training for m in model.modules()]
    random.seed(3)
    python_state = random.getstate()
    found = find(model, loader)
    check_equal(cores(model), {name: value * (found.lr / 1e-3) for name, value in before.items()})
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(first.grad, torch.ones_like(first))
    assert find(patched(dropout=0.3), loader) == found  # the same rows and the same dropout masks in every trial


def test_accumulated_batches_are_one_step() -> None:
    """With equal token counts, two batches of two rows give the mean gradient of one batch of four."""
    whole = batches(6, rows=4)
    one = find(patched(), whole, steps=4)
    two = find(patched(), [*whole[:2], *batches(12)[4:]], steps=4, accumulation=2)
    for rate in one.losses.keys() & two.losses.keys():
        assert two.losses[rate] == pytest.approx(one.losses[rate], rel=1e-6)


def test_a_rate_that_diverges_is_never_taken() -> None:
    model = patched()
    found = find(
        model, optimizer=lambda parameters, rate: torch.optim.SGD(parameters, lr=1e30 if rate > 1e-3 else rate)
    )
    assert found.losses[2e-3] == math.inf
    assert found.lr <= 1e-3
    assert all(torch.isfinite(value).all() for value in cores(model).values())


@given(best=st.integers(-9, 9), slope=st.floats(0.01, 1.0))
def test_the_search_finds_the_least_of_a_valley(best: int, slope: float) -> None:
    losses = _search(1.0, lambda rate: slope * abs(math.log2(rate) - best))
    assert math.log2(min(losses, key=lambda rate: losses[rate])) == max(-FARTHEST, min(FARTHEST, best))
    assert len(losses) <= FARTHEST + 3


def test_ranks_decide_by_the_mean_of_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's loss is 3 at every rate."""
    alone = find(patched())
    two = SimpleNamespace(rank=1, world_size=2, all_reduce_sum=lambda value: value + 3.0)
    two.together = lambda doing: contextlib.nullcontext()
    monkeypatch.setattr(rate_trials, "Processes", lambda: two)
    found = find(patched())
    assert found.lr == alone.lr
    assert found.losses == {rate: pytest.approx((loss + 3.0) / 2) for rate, loss in alone.losses.items()}


def test_a_wrapped_model_is_tried_as_itself(tmp_path: Path) -> None:
    """DistributedDataParallel has no `peft_config`: R's start and η come from its module."""
    model, wrapped = patched(), patched()
    alone = find(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert find(nn.parallel.DistributedDataParallel(wrapped)).losses == alone.losses
        again = lorasb.initialize(nn.parallel.DistributedDataParallel(patched()), batches(4), lr=1e-3, progress=False)
    finally:
        dist.destroy_process_group()
    check_equal(cores(wrapped), cores(model))
    etas = [one.peft_config["default"].init_provenance["lr"] for one in (wrapped, model)]
    assert etas == [pytest.approx(alone.lr)] * 2
    assert len(again.layers) == 14


def test_a_head_keeps_its_own_rate() -> None:
    seen: list[tuple[float, ...]] = []

    def two_groups(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": rate}]
        optimizer = torch.optim.SGD(groups)
        optimizer.register_step_pre_hook(lambda *_: seen.append(tuple(group["lr"] for group in optimizer.param_groups)))
        return optimizer

    find(patched(), batches(5), steps=3, optimizer=two_groups)
    assert seen[:3] == [(0.25, 5e-4), (0.5, 1e-3), (0.5, 1e-3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "expected a positive learning rate to try first, at most 10000, got 0.0"),
        ({"lr": math.inf}, "expected a positive learning rate"),
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"judged": 0}, "expected judged of at least 1, got 0"),
        ({"accumulation": 0}, "expected accumulation of at least 1, got 0"),
        ({"steps": 9}, "trials of 9 steps need 11 batches .2 of them for the loss., got 8: pass more, or steps=6"),
        ({"given": [{"input_ids": batch["input_ids"]} for batch in batches(8)]}, "the model gives no loss: batches need labels, and have input_ids"),
        ({"given": [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches(8)]}, r"no trial has a finite loss, at rates of .*0\.001, 0\.002: check the labels"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_said_and_changes_nothing(arguments: dict[str, object], message: str) -> None:
    model = patched()
    before = cores(model)
    with pytest.raises(ValueError, match=message):
        find(model, **arguments)
    check_equal(cores(model), before)


def test_a_model_that_trains_nothing_is_named_and_the_result_says_what_was_tried() -> None:
    with pytest.raises(ValueError, match=r"no parameter requires a gradient: model\.set_adapter"):
        find(make("llama").requires_grad_(False))
    found = lorasb.RateTrials(2e-3, {1e-3: 0.5, 2e-3: 0.25}, 12)
    assert str(found) == "learning rate 0.002, by trials of 12 steps (0.001: 0.500, 0.002: 0.250)"


@pytest.mark.parametrize(
    ("of_whole", "of_quarter", "factor"),
    [(1.0, 1.5, 2.0), (2.0, 1.5, 0.5), (math.inf, 1.5, 0.25), (1.0, math.inf, 1.0)],
)
def test_a_measured_rate_is_doubled_or_halved(
    of_whole: float, of_quarter: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubled if its loss after four steps beats its quarter's; a finite loss wins. R is scaled to the result."""
    model = patched()
    before = cores(model)
    losses, rates = {1e-3: of_whole, 2.5e-4: of_quarter}, []
    monkeypatch.setattr(rate_trials._Trial, "_judged", lambda self: torch.tensor(losses[rates.pop()]).double())
    monkeypatch.setattr(rate_trials._Trial, "_steps", lambda self, opt, bar: rates.append(opt.param_groups[0]["lr"]))
    found = rate_trials.refine_rate(model, batches(8), 1e-3, progress=False)
    assert (found.lr, found.losses, found.steps) == (1e-3 * factor, losses, rate_trials.PROBE_STEPS)
    check_equal(cores(model), {name: value * factor for name, value in before.items()})


@pytest.mark.parametrize("count", range(2, 17))
def test_no_batch_is_trained_on_and_judges(count: int) -> None:
    """With any number of batches, all of which are used."""
    numbered = [{"input_ids": torch.tensor([i])} for i in range(count)]
    found = [int(batch["input_ids"]) for batch in itertools.islice(rate_trials.apart(numbered), 16)]
    judging, trained = set(found[: rate_trials.JUDGED]), set(found[rate_trials.JUDGED :])
    assert judging.isdisjoint(trained)
    assert judging | trained == set(range(count))


def test_a_head_learns_at_a_usual_rate_while_that_of_r_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = patched(), []
    model.get_base_model().lm_head.weight.requires_grad_(True)

    def steps(self: object, optimizer: torch.optim.Optimizer, bar: object) -> None:
        seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])

    monkeypatch.setattr(rate_trials._Trial, "_steps", steps)
    rate_trials.refine_rate(model, batches(8), 4e-3, progress=False)
    count = len(cores(model)) - 1  # without the head
    assert seen == [[(count, rate), (1, rate_trials.OTHER_RATE)] for rate in (1e-3, 4e-3)]


def test_trials_without_a_finite_loss_keep_a_measured_rate() -> None:
    """The caller's loss function replaces the model's loss."""
    model, seen = patched(), []
    before = cores(model)

    def broken(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch)
        return model(**batch).loss * math.nan

    with pytest.warns(UserWarning, match="no trial of learning rates has a finite loss: 0.001 stays as measured"):
        found = rate_trials.refine_rate(model, batches(8), 1e-3, loss_fn=broken, progress=False)
    assert (found.lr, len(seen)) == (1e-3, 2 * (rate_trials.PROBE_STEPS + rate_trials.JUDGED))
    check_equal(cores(model), before)


def test_only_the_adapter_of_a_measured_rate_is_scaled() -> None:
    model = patched()
    model.add_adapter("other", lorasb.LoRASBConfig(r=4, init="random"))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, core in model.named_parameters():
            if "lorasb_R.other" in name:
                core.fill_(1.0)
    rate_trials.refine_rate(model, batches(8), 1e-3, adapter="default", progress=False)
    assert all(bool((core == 1.0).all()) for name, core in model.named_parameters() if "lorasb_R.other" in name)


def test_a_loaded_adapter_is_not_scaled(tmp_path: Path) -> None:
    """Its R is trained, not a start."""
    patched().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make("llama").double(), tmp_path, is_trainable=True)
    before, rate = cores(model), model.peft_config["default"].init_provenance["lr"]
    assert find(model).lr != 1e-3
    check_equal(cores(model), before)
    assert model.peft_config["default"].init_provenance["lr"] == rate


def test_statistics_of_batch_norms_and_random_states_are_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = np.random.get_state()[1].tolist()
    with rate_trials._restored(model, list(model.parameters())):
        model.train()(torch.randn(8, 4) + np.random.rand(700)[0] + 3.0)
        assert not torch.equal(model[0].running_mean, before["0.running_mean"])
    check_equal(dict(model.named_buffers()), before)
    assert np.random.get_state()[1].tolist() == state


def test_a_copy_of_a_start_is_scaled_as_the_start_is() -> None:
    model = patched()
    lorasb.add_adapters(model, ["ada"], basis_start="same")
    model.set_adapter("ada")
    before = cores(model)
    found = find(model)
    assert found.lr != 1e-3
    check_equal(cores(model), {name: value * (found.lr / 1e-3) for name, value in before.items()})
