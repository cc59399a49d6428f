"""`lorasb.initialize`: the best factors of their rank, a bounded R, and a model that is otherwise unchanged."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from adapters import layers, unchanged
from basis_models import base, with_users
from gradients import autograd_sums, factors
from models import Batch, batches_for, make, patched, started
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler

import lorasb
from lorasb.init import InitReport


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize(("update", "count"), [("adamw", 6), ("sgd", 6), ("sgd", 1)])
def test_factors_are_the_best_rank_r_part_of_the_first_step(family: str, update: str, count: int) -> None:
    singles = batches_for(family, count=count, rows=1)
    want = autograd_sums(family, singles)
    model, _ = started(family, r=5, scaling=2.0, batches=singles, lr=1e-2, update=update, longest_start=None)
    for name, layer in layers(model).items():
        g = want[name].double()
        step = -1e-2 * (torch.sign(g) if update == "adamw" else g / len(singles))
        a, core, b = (getattr(layer, f"lorasb_{part}")["default"].double() for part in "ARB")
        sigma = torch.linalg.svdvals(step)
        tolerances.check(a @ a.t(), torch.eye(5), tolerances.ORTHONORMAL)
        tolerances.check(b.t() @ b, torch.eye(5), tolerances.ORTHONORMAL)
        tolerances.check(2.0 * core / sigma[0], b.t() @ step @ a.t() / sigma[0], tolerances.FACTORS)
        assert (2.0 * core).square().sum() >= tolerances.ENERGY * sigma[:5].square().sum()  # near ties: compare energy
        assert (torch.diagonal(core) > 0).all()


@pytest.mark.parametrize("trained", ["classifier", "rows"])
def test_an_inactive_adapter_is_initialized_with_its_own_head_and_token_rows(trained: str) -> None:
    """And not with those of the active adapter, which has trained them."""
    found = []
    for active in (False, True):
        family, options = ("bert", {}) if trained == "classifier" else ("llama", {"trainable_token_indices": [5, 6, 7]})
        first, second = batches_for(family, count=2, rows=4)
        model = lorasb.patch(make(family), r=4, **options)
        lorasb.initialize(model, [first], lr=1e-2, progress=False)
        config = lorasb.LoRASBConfig(r=4, task_type=model.peft_config["default"].task_type, **options)
        model.add_adapter("second", config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lorasb" not in name:
                parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        if active:
            model.set_adapter("second")
        report = lorasb.initialize(model, [second], lr=1e-2, adapter_name="second", progress=False)
        found.append((report.loss, [layer.get_delta_weight("second") for layer in layers(model).values()]))
        assert model.active_adapters == (["second"] if active else ["default"])
    (loss, deltas), (same_loss, same_deltas) = found
    assert loss == same_loss
    assert all(map(torch.equal, deltas, same_deltas))


def cores(
    longest_start: float | None, update: str = "adamw", scaling: float = 1.0
) -> tuple[dict[str, Tensor], InitReport]:
    """s·R of all layers, and the report."""
    model, report = started(scaling=scaling, update=update, longest_start=longest_start)
    return {name: scaling * p.detach() for name, p in model.named_parameters() if "lorasb_R" in name}, report


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_long_start_is_as_long_as_so_many_steps_of_adamw(scaling: float) -> None:
    whole, _ = cores(None, scaling=scaling)
    adam = torch.nn.Parameter(torch.zeros(4, 4))
    adam.grad = torch.randn(4, 4)
    torch.optim.AdamW([adam], lr=1e-3).step()
    step = float(adam.detach().norm())
    for steps in (1.0, 1.5):
        found, report = cores(steps, scaling=scaling)
        shares = {layer.name: layer.start for layer in report.layers}
        for name, core in found.items():
            share = next(value for layer, value in shares.items() if layer in name)
            tolerances.check(core, share * whole[name], tolerances.FACTORS)
            assert float(core.norm()) <= steps * step * (1 + 1e-4)
            assert share == 1.0 or float(core.norm()) == pytest.approx(steps * step, rel=1e-4)
        assert min(shares.values()) < 1.0
        assert f"R starts {steps:g} optimizer steps from 0" in str(report)


def test_starts_without_a_limit_and_without_a_start() -> None:
    whole, report = cores(None)
    assert all(layer.start == 1.0 for layer in report.layers)
    assert "steps from 0" not in str(report)
    tolerances.check_equal(cores(1e6)[0], whole)
    assert not any(core.any() for core in cores(0.0)[0].values())
    tolerances.check_equal(cores(0.0, "sgd")[0], cores(None, "sgd")[0])


def test_sgd_divides_by_the_rows_with_labels_or_by_all_rows_of_another_loss() -> None:
    """Of two rows per batch, one has labels; the other loss weighs its gradient by both."""
    batches = batches_for("llama", count=3, rows=2)
    for batch in batches:
        batch["labels"][1] = -100
    by_labels, _ = started(update="sgd", batches=batches)
    by_rows, _ = started(update="sgd", batches=batches, loss_fn=lambda model, batch: 0.5 * model(**batch).loss)
    for name, layer in layers(by_labels).items():
        other = layers(by_rows)[name]
        tolerances.check(2 * other.get_delta_weight("default"), layer.get_delta_weight("default"), tolerances.FACTORS)


def test_a_bf16_layer_has_orthonormal_factors_up_to_its_rounding() -> None:
    for name, p in patched(dtype=torch.bfloat16).named_parameters():
        if "lorasb_A" in name:
            assert p.dtype == torch.bfloat16
            tolerances.check(p.double() @ p.double().t(), torch.eye(4), tolerances.ROUNDED_FACTORS)


def test_repeatable_and_the_global_rng_stays_where_it_was() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    *models, drawn = (lorasb.patch(make("llama"), r=4) for _ in range(4))
    torch.set_rng_state(state)
    for seed, model in zip((5, 5, 6), models, strict=True):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, num_samples=4, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
    data = list(range(8))
    drawing = DataLoader(data, sampler=SubsetRandomSampler(data), collate_fn=lambda _: batches_for("llama", 1)[0])
    lorasb.initialize(drawn, drawing, lr=1e-3, num_samples=4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (factors(model) for model in models)
    tolerances.check_equal(first, second)
    assert not all(torch.equal(value, third[name]) for name, value in first.items())


@pytest.mark.parametrize("update", ["adamw", "per-sample"])
def test_under_the_callers_autocast_factors_are_orthonormal(update: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, _ = started(update=update)
    for name, p in model.named_parameters():
        if "lorasb_A" in name:
            tolerances.check(p @ p.t(), torch.eye(4), tolerances.ORTHONORMAL)


@pytest.mark.parametrize("update", ["adamw", "sgd", "per-sample"])
def test_the_energy_of_the_sign_is_of_the_sign_whatever_was_factored(update: str) -> None:
    singles = batches_for("llama", count=6, rows=1)
    want = autograd_sums("llama", singles)
    model, report = started(batches=singles, update=update)
    for layer in report.layers:
        signs = want[layer.name].double().sign()
        b, a = (getattr(layers(model)[layer.name], f"lorasb_{part}")["default"].double() for part in "BA")
        share = (b.t() @ signs @ a.t()).square().sum() / signs.square().sum()
        assert layer.energy_sign == pytest.approx(float(share), abs=1e-3)


def interrupted() -> Iterator[Batch]:
    yield batches_for("llama")[0]
    raise KeyboardInterrupt("Ctrl+C")


def first_block(model: nn.Module, batch: Batch) -> Tensor:
    inner = model.get_base_model().model
    rotary = inner.rotary_emb(torch.zeros(1, 1, 64), torch.arange(12)[None])
    return inner.layers[0](inner.embed_tokens(batch["input_ids"]), position_embeddings=rotary).mean()


def not_finite(model: nn.Module, batch: Batch, value: float) -> Tensor:
    """A loss whose gradients are infinite or NaN."""
    values = model(**batch).logits
    values.register_hook(lambda g: g * value)
    return values.square().mean()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """An initialized model, which no failure may change."""
    return patched()


UNLABELED = [{"input_ids": b["input_ids"]} for b in batches_for("llama")]
IGNORED = [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches_for("llama")]
NOTHING_GIVEN = "init='update' takes batches and lr > 0"
NOT_FINITE = r"the gradient of layer 'model\.layers\..*' has NaN or Inf entries"
MOMENTS = {"update": "per-sample"}
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"batches": UNLABELED}, "the model returned no loss .*: add labels to the batches, or pass loss_fn"),
    "ignored labels": ({"batches": IGNORED}, "no sample has a labeled token: every label of these batches is -100"),
    "lr infinite": ({"lr": math.inf}, NOTHING_GIVEN),
    "no batches": ({"batches": None}, NOTHING_GIVEN),
    "no lr": ({"lr": None}, NOTHING_GIVEN + ".* got no lr, or 0: "),
    "lr zero": ({"lr": 0.0}, NOTHING_GIVEN),
    "lr text": ({"lr": "Auto"}, NOTHING_GIVEN),
    "a batch": ({"batches": UNLABELED[0]}, r"expected a list of batches, .* got a single batch: pass \[batch\]"),
    "start negative": ({"longest_start": -1.0}, "longest_start"),
    "start no number": ({"longest_start": math.nan}, "longest_start"),
    "rate of tasks": ({"batches": {"a": IGNORED}, "lr": "auto"}, "lr='auto' measures the rate of one task"),
    "no size": ({"memory_budget": "6TB"}, "expected a size like '6GB'"),
    "negative size": ({"memory_budget": -1.0}, "expected a positive number of bytes"),
    "halves of moments": (MOMENTS | {"stability": True}, "stability compares subspaces of sign"),
    "a cache of moments": (MOMENTS | {"cache": "signs"}, "'per-sample' needs each sample's gradient.*leave cache out"),
    "a cache of gradients": ({"update": "sgd", "cache": "signs"}, "'sgd' needs the gradient itself, and a cache keeps"),
    "a folder for a cache": ({"cache": Path(__file__).parent}, "expected a file for cache=, got the folder"),
    "update": ({"update": "lion"}, "update must be one of adamw, sgd, per-sample, got 'lion'"),
    "strategy": ({"strategy": "fast"}, "strategy must be one of .*, got 'fast'"),
    "no samples": ({"num_samples": 0}, "expected num_samples >= 1, got 0"),
    "adapter": ({"adapter_name": "other"}, "no layer has an adapter 'other': the model has default"),
    "no graph": ({"loss_fn": lambda m, b: torch.ones(())}, "does not depend on any adapted layer"),
    "a loss a row": ({"loss_fn": lambda m, b: m(**b).logits[:, 0, 0]}, r"expected one loss, got a tensor \[2\]"),
    "not reached": ({"loss_fn": first_block}, "layer 'model.layers.1.self_attn.q_proj' was never reached"),
    "zero": ({"loss_fn": lambda m, b: 0.0 * m(**b).logits.sum()}, "is zero: the loss does not depend on it"),
    "NaN": ({"loss_fn": partial(not_finite, value=math.nan)}, NOT_FINITE),
    "Inf": ({"loss_fn": partial(not_finite, value=math.inf)}, NOT_FINITE),
    "interrupted": ({"batches": interrupted()}, r"Ctrl\+C"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_and_interrupted_calls_change_nothing(name: str, model: PeftModel) -> None:
    options, message = BAD_CALLS[name]
    with unchanged(model), pytest.raises((ValueError, TypeError, KeyboardInterrupt), match=message):
        lorasb.initialize(model, **{"batches": batches_for("llama"), "lr": 1e-3, "progress": False} | options)


def test_merged_or_unpatched_models_are_refused() -> None:
    model = patched()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected unmerged weights.*model\.unmerge_adapter\(\)"):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3)
    with pytest.raises(ValueError, match=r"call model = lorasb\.patch\(model\) first"):
        lorasb.initialize(make("llama"), batches_for("llama"), lr=1e-3)


def test_a_layer_outside_of_the_blocks_that_is_not_reached_is_named() -> None:
    base = make("llama")
    base.spare = nn.Linear(4, 4)
    model = lorasb.patch(base, r=4, target_modules=["q_proj", "spare"])
    with pytest.raises(ValueError, match="layer 'spare' was never reached by these batches"):
        lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)


def test_inference_mode_of_the_caller_is_left() -> None:
    model = lorasb.patch(make("llama"), r=4)
    with torch.inference_mode():
        report = lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    assert report.num_samples == started()[1].num_samples
    model(**batches_for("llama")[0]).loss.backward()


TASKS = {"math": batches_for("llama")[:1], "code": batches_for("llama")[1:2]}


def test_tasks_that_cannot_be_are_refused_and_leave_the_model() -> None:
    with pytest.raises(ValueError, match="longest_start=0 leaves no first steps"):
        lorasb.initialize(lorasb.patch(make("llama"), r=4), {"a": [], "b": []}, lr=1e-3, longest_start=0)
    with pytest.raises(ValueError, match="as tasks' first steps make the basis, got 'lora-xs'"):
        lorasb.initialize(lorasb.patch(make("llama"), r=4, init="lora-xs"), TASKS, lr=1e-3)
    model = lorasb.patch(base(), r=4)
    for tasks, options, message in (
        ({"math": batches_for("llama")}, {}, "two tasks or more, got 1"),
        ({"default": [], "code": []}, {}, "has an adapter 'default' already"),
        ({"copy": [], "code": []}, {}, "expected a name without dots for each adapter"),
        (TASKS, {"cache": "signs.safetensors"}, "initialize several tasks without it"),
        (TASKS, {"lr": None}, "takes batches and lr > 0"),
        (TASKS | {"code": []}, {}, "."),  # any error about the second task
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            lorasb.initialize(model, tasks, **{"lr": 1e-3, "progress": False} | options)
    based = with_users("ada")
    with unchanged(based), pytest.raises(ValueError, match="'default' is the basis of ada, whose R would mean nothing"):
        lorasb.initialize(based, TASKS, lr=1e-3, adapter_name="default", progress=False)
