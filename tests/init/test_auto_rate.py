"""lr="auto": the rate at which an aligned step changes the median layer's outputs by RHO, measured on the samples."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tolerances
import torch
import transformers
from adapters import layers
from models import batches_for, make, patched, started
from quantized_models import dense_twin
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader
from trainer_runs import ROWS, train

import lorasb
from lorasb.distributed.process_group import Processes
from lorasb.init import InitReport, auto_rate
from lorasb.init.task import AutoRate, InitOptions, Piece
from lorasb.layers.linear import LoRASBLinear
from lorasb.training import init_callback


def cores(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lorasb_R" in name]


@torch.no_grad()
def change_by_an_aligned_step(model: nn.Module, family: str, rate: float) -> float:
    """Median over layers of rms‖s·B ΔR A x‖ / rms‖W x‖, with ΔR = rate·1 aligned with each |u|, in float64."""
    shares: dict[nn.Module, list[float]] = {}

    def add(layer: LoRASBLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        u = inputs[0].double() @ layer.lorasb_A["default"].double().t()
        sums = shares.setdefault(layer, [0.0, 0.0])
        sums[0] += float((layer.scaling["default"] * rate * u.shape[-1] * u).square().sum())
        sums[1] += float(output.double().square().sum())

    for layer in layers(model).values():
        layer.register_forward_hook(add)
    model.eval()
    with model.disable_adapter():
        for batch in batches_for(family):
            model(**batch)
    return statistics.median(math.sqrt(low / whole) for low, whole in shares.values())


@pytest.mark.parametrize(
    ("family", "update", "init"),
    [("llama", "adamw", "update"), ("roberta", "per-sample", "update"), ("llama", "adamw", "lora-xs")],
)
def test_a_step_at_the_rate_changes_outputs_by_rho(family: str, update: str, init: str) -> None:
    model = lorasb.patch(make(family), r=4, scaling=0.5, init=init)
    options = {"batches": batches_for(family), "update": update, "progress": False}
    given, report = (lorasb.initialize(model, lr=lr, **options) for lr in (1e-3, "auto"))
    assert given.rate is None
    change = change_by_an_aligned_step(model, family, report.rate)
    tolerances.check(torch.tensor(change), torch.tensor(auto_rate.RHO), tolerances.fp32(64))


@pytest.fixture(scope="module")
def usual() -> tuple[nn.Module, InitReport]:
    """A Llama initialized with a measured rate, and its report."""
    return started(lr="auto")


def test_the_start_is_as_if_the_rate_had_been_given(usual: tuple[nn.Module, InitReport]) -> None:
    model, report = usual
    again, other = started(lr=report.rate)
    assert report.lr == other.lr == model.peft_config["default"].init_provenance["lr"]
    tolerances.check(cores(model), cores(again), tolerances.FACTORS)


def test_a_warm_up_divides_the_first_step_and_not_the_rate(usual: tuple[nn.Module, InitReport]) -> None:
    """R's norm is proportional to the first step's rate."""
    given = lorasb.first_step_lr("auto", 0.1, total_steps=50)
    assert given == AutoRate(5.0)
    model, report = started(lr=given)
    assert report.rate == usual[1].rate
    assert report.lr == pytest.approx(report.rate / 5)
    tolerances.check([5 * core for core in cores(model)], cores(usual[0]), tolerances.FACTORS)


def test_the_samples_of_a_cache_are_measured_too(tmp_path: Path) -> None:
    file = tmp_path / "signs"
    _, first = started(lr="auto", cache=file)
    _, second = started(lr="auto", cache=file)
    assert (second.strategy, second.rate) == ("cache", pytest.approx(first.rate))
    model = lorasb.patch(make("llama"), r=4)
    with pytest.raises(ValueError, match="lr='auto' measures on samples, but a cache holds only signs"):
        lorasb.initialize(model, None, lr="auto", cache=file, progress=False)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (0.0, "no activations of a linear layer are finite"),
        (math.inf, "no activations of a linear layer are finite"),
        (1e9, r"the samples ask for .*, more than 10000"),
    ],
)
def test_what_cannot_be_measured_has_a_stated_fallback(weight: float, reason: str) -> None:
    model = lorasb.patch(make("llama"), r=4)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.base_layer.weight.fill_(weight)
            layer.lorasb_A["default"].fill_(1e-3)
    pieces = [Piece(batch) for batch in batches_for("llama")]
    work = auto_rate.Work(model, layers(model), pieces, InitOptions(adapter="default"), Processes())
    with pytest.warns(UserWarning, match=f"lr='auto' falls back to 0.032, as {reason}"):
        assert auto_rate.measured_rate(work) == auto_rate.FALLBACK / 4


def test_a_base_in_4_bits_has_the_rate_of_its_values(usual: tuple[nn.Module, InitReport]) -> None:
    rates = []
    for same in (dense_twin, nn.Module.eval):
        model = lorasb.patch(same(lorasb.quantize(make("llama"), "nf4")), r=4)
        rates.append(lorasb.initialize(model, batches_for("llama"), lr="auto", progress=False).rate)
    assert rates[1] == pytest.approx(rates[0], rel=1e-3)
    assert rates[0] != usual[1].rate


def test_a_loss_of_the_users_is_called_for_the_forward(usual: tuple[nn.Module, InitReport]) -> None:
    _, given = started(lr="auto", loss_fn=lambda model, batch: model(**batch).loss)
    assert given.rate == pytest.approx(usual[1].rate, rel=0.2)  # samples are weighted differently, which changes signs


def train_measured(
    folder: Path, **options: object
) -> tuple[Any, lorasb.InitCallback, list[tuple[Tensor, list[Tensor]]]]:
    """Train; return the trainer, its callback, and the random states and R before and after the callback."""
    seen: list[tuple[Tensor, list[Tensor]]] = []

    class Begin(transformers.TrainerCallback):
        def on_train_begin(self, *args: object, model: nn.Module, **kwargs: object) -> None:
            seen.append((torch.get_rng_state(), [core.detach().clone() for core in cores(model)]))

    callback = lorasb.InitCallback(lr="auto", num_samples=6)
    model = lorasb.patch(make("llama"), r=4)
    return train(model, folder, [Begin(), callback, Begin()], warmup_steps=2, **options), callback, seen


def by_hand() -> tuple[nn.Module, InitReport]:
    """Initialize as the callback does before it tries rates on the trainer's data."""
    return started(batches=DataLoader(ROWS, batch_size=3), lr=lorasb.first_step_lr("auto", 2), num_samples=6, seed=3)


@pytest.mark.parametrize("option", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_a_trainer_trains_r_at_the_rate(tmp_path: Path, option: dict[str, object]) -> None:
    """Trials on the trainer's data double or halve the measured rate; random states do not change."""
    trainer, callback, ((state_before, _), (state_after, start)) = train_measured(tmp_path, **option)
    assert torch.equal(state_before, state_after)
    rate, (model, raw) = callback.report.rate, by_hand()
    assert rate / raw.rate in (pytest.approx(0.5, rel=2e-2), pytest.approx(2.0, rel=2e-2))
    if not option:  # the start is doubled or halved with the rate
        tolerances.check(start, [core * rate / raw.rate for core in cores(model)], tolerances.FACTORS)
    assert callback.report.lr == pytest.approx(rate / 2)
    assert trainer.model.peft_config["default"].init_provenance["lr"] == pytest.approx(callback.report.lr)
    assert all(group["initial_lr"] == rate for group in trainer.optimizer.param_groups if group["params"])
    assert trainer.lr_scheduler.base_lrs[0] == rate
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) <= rate * (1 + 1e-6)


@pytest.mark.parametrize("size", [3, 12])
def test_a_trainers_rows_judge_or_are_trained_on(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row does both, even if all rows fit into a single batch, which is then halved."""
    seen, callback = Mock(return_value=lorasb.RateTrials(1e-3, {}, 4)), lorasb.InitCallback(lr="auto", num_samples=6)
    monkeypatch.setattr(init_callback, "refine_rate", seen)
    train(lorasb.patch(make("llama"), r=4), tmp_path, [callback], per_device_train_batch_size=size)
    given = list(itertools.islice(seen.call_args.args[1], 12))
    judging, trained = (
        {tuple(row.tolist()) for one in part for row in one["input_ids"]} for part in (given[:4], given[4:])
    )
    assert (len(judging), len(trained)) == (6, 6)
    assert judging.isdisjoint(trained)


def set_rate(model: nn.Module, groups: list[Any]) -> list[list[float]]:
    """Return the groups' rates after setting R's to 0.003, and after a step of a schedule that halves them."""
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = schedules.LambdaLR(optimizer, lambda step: 0.5**step)
    init_callback._set_rate(3e-3, optimizer, schedule, layers(model), "default")
    rates = [[group["lr"] for group in optimizer.param_groups]]
    assert schedule.get_last_lr() == rates[0]  # the trainer logs it
    assert schedule.base_lrs == [group["initial_lr"] for group in optimizer.param_groups]
    optimizer.step()
    schedule.step()
    return [*rates, [group["lr"] for group in optimizer.param_groups]]


def test_r_alone_gets_the_rate(usual: tuple[nn.Module, InitReport]) -> None:
    """R's groups keep their ratios (layer-wise decay); a head's keeps its rate; a head in R's group gives a warning."""
    model, head = usual[0], [*nn.Linear(2, 2).parameters()]
    near, far = cores(model)[:7], cores(model)[7:]
    for groups, rates, peaks in (
        ([{"params": head, "lr": 0.5}, {"params": cores(model)}], [0.5, 3e-3], [0.5, 3e-3]),
        ([{"params": near, "lr": 1e-3}, {"params": far, "lr": 1e-4}], [3e-3, 3e-4], [3e-3, 3e-4]),
        ([{"params": cores(model), "lr": 0.0}], [0.0], [3e-3]),  # the rate applies from the schedule's next step on
    ):
        first, second = set_rate(model, groups)
        assert first == pytest.approx(rates)
        assert second == pytest.approx([rate / 2 for rate in peaks])
    optimizer = torch.optim.AdamW([*cores(model), *head], lr=1e-2)
    with pytest.warns(UserWarning, match=r"modules other than R \(a head\) train at R's rate 0\.003"):
        init_callback._set_rate(3e-3, optimizer, None, layers(model), "default")


@pytest.mark.parametrize(
    ("kind", "schedule_of", "why"),
    [
        (torch.optim.SGD, lambda own: schedules.LambdaLR(own, lambda _: 1.0), "the optimizer is SGD"),
        (torch.optim.AdamW, lambda own: schedules.OneCycleLR(own, 1e-2, 100), "the schedule is a OneCycleLR"),
    ],
)
def test_other_optimizers_and_schedules_keep_the_rate_of_the_arguments(
    kind: Any, schedule_of: Any, why: str, tmp_path: Path
) -> None:
    """Steps of SGD are proportional to the gradient, and the peaks of torch's schedules ignore base rates."""
    model, callback = lorasb.patch(make("llama"), r=4), lorasb.InitCallback(lr="auto")
    optimizer = kind(cores(model), lr=1e-2)
    schedule = schedule_of(optimizer)
    before = optimizer.param_groups[0]["initial_lr"]
    with pytest.warns(UserWarning, match=f"{why}: learning_rate=0.01 stays"):
        train(model, tmp_path, [callback], optimizers=(optimizer, schedule))
    assert (callback.report.rate, callback.report.lr) == (None, 1e-2)
    assert optimizer.param_groups[0]["initial_lr"] == before


def test_a_checkpoint_has_the_measured_rate_in_its_optimizer(tmp_path: Path) -> None:
    """Without optimizer.pt, the rate of the arguments stays."""
    first, last = lorasb.InitCallback(lr="auto"), tmp_path / "checkpoint-2"
    train(lorasb.patch(make("llama"), r=4), tmp_path, [first])

    def resumed() -> Any:
        model = lorasb.patch(make("llama"), r=4)
        return train(model, tmp_path, [lorasb.InitCallback(lr="auto")], resume=str(last), save_strategy="no")

    assert resumed().optimizer.param_groups[0]["initial_lr"] == first.report.rate
    (last / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"which has the measured rate: learning_rate=0\.01 stays"):
        resumed()


def test_a_training_that_begins_again_is_measured_no_more_and_refined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that runs out of memory ends the first start (`auto_find_batch_size`); the second one completes."""
    refined = Mock(side_effect=[RuntimeError("CUDA out of memory"), lorasb.RateTrials(2e-3, {}, 4)])
    monkeypatch.setattr(init_callback, "refine_rate", refined)
    model, callback = lorasb.patch(make("llama"), r=4), lorasb.InitCallback(lr="auto", num_samples=6)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, tmp_path, [callback])
    for _ in range(2):
        trainer = train(model, tmp_path, [callback])
        assert all(group["initial_lr"] == 2e-3 for group in trainer.optimizer.param_groups if group["params"])
    assert refined.call_count == 2


def test_every_model_of_a_callback_is_measured(tmp_path: Path) -> None:
    """`model_init` makes one after another. A model that was already initialized trains at the arguments' rate."""
    callback = lorasb.InitCallback(lr="auto", num_samples=6)
    trainers = [train(lorasb.patch(make("llama"), r=r), tmp_path, [callback]) for r in (4, 2)]
    rates = [{group["initial_lr"] for group in one.optimizer.param_groups if group["params"]} for one in trainers]
    assert rates[0] != rates[1] == {callback.report.rate}
    with pytest.warns(UserWarning, match=r"is initialized already, so that no rate is measured: learning_rate=0\.01"):
        train(patched(), tmp_path, [callback])


@pytest.mark.parametrize(
    ("rate", "schedule_of", "option", "eta"),
    [
        (3e-2, lambda _: None, {"warmup_steps": 2}, 3e-2 / 2),
        (None, None, {"warmup_steps": 2, "lr_scheduler_type": "constant"}, 1e-2),
        (None, None, {"warmup_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, 1e-2),
        (1e-3, lambda own: schedules.CosineAnnealingLR(own, 6), {}, 1e-3),
        (1e-3, lambda own: schedules.OneCycleLR(own, 8e-3, 100), {}, 8e-3),
        (1e-3, lambda own: transformers.get_linear_schedule_with_warmup(own, 10, 100), {}, 1e-4),
        (1e-3, lambda own: schedules.LambdaLR(own, lambda _: 2.0), {}, 1e-3),
    ],
)
def test_a_start_is_that_of_the_optimizers_rate_and_schedule(
    rate: float | None, schedule_of: Any, option: dict[str, object], eta: float, tmp_path: Path
) -> None:
    """Their peak and warm-up count, whatever the arguments say; a constant schedule has no warm-up."""
    model, callback = lorasb.patch(make("llama"), r=4), lorasb.InitCallback(num_samples=6)
    own = torch.optim.AdamW(cores(model), lr=rate) if rate else None
    given = (own, schedule_of(own)) if own else None
    train(model, tmp_path, [callback], optimizers=given, save_strategy="no", **option)
    assert callback.report.lr == pytest.approx(eta)


def test_a_process_without_labels_keeps_the_measured_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several processes may get no labels in its share of a small data set."""
    monkeypatch.setattr(init_callback, "labeled_rows", lambda batch: 0)
    with pytest.warns(UserWarning, match=r"a process has no labeled rows to try rates on: .* as measured"):
        _, callback, _ = train_measured(tmp_path)
    assert callback.report.rate == by_hand()[1].rate


def test_a_rate_that_cannot_be_measured_leaves_a_start_without_data_as_it_was() -> None:
    model = lorasb.patch(make("llama"), r=4, init="lora-xs")
    for core in cores(model):
        core.data.fill_(0.1)
    with pytest.raises(ValueError, match="the batches are empty"):
        lorasb.initialize(model, [], lr="auto", progress=False)
    assert all((core == 0.1).all() for core in cores(model))


@pytest.mark.parametrize(
    ("lr", "option", "message"),
    [
        ("auto", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}, r"min_lr=1e-05 is taken relative to learning_rate=0\.01.*pass min_lr_rate"),
        (None, {"learning_rate": 5e-5}, r"trains at Trainer's default learning_rate=5e-05, .*: InitCallback\(lr='auto'\)"),
    ],
)  # fmt: skip
def test_rates_of_the_arguments_that_are_no_good_for_r_are_named(
    lr: Any, option: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message):
        train(lorasb.patch(make("llama"), r=4), tmp_path, [lorasb.InitCallback(6, lr=lr)], **option)
