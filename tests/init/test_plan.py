"""Planning: the estimate, a refusal that suggests what would fit, and models that do not fit on their device."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from gradients import autograd_sums, check_sums, factors, library_sums
from models import Batch, batches_for, make, started, text
from torch import Tensor, nn

import lorasb
from lorasb.init import plan

SINGLES = batches_for("llama", rows=1)


def needed(batches: list[Batch], **options: object) -> float:
    """The estimate for these batches."""
    plans: list[plan.InitPlan] = []
    plain = plan.plan_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "plan_for", lambda *args: (plans.append(plain(*args)), plans[-1])[1])
        started(batches=batches, **options)
    return plans[-1].memory


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_what_does_not_fit_is_refused_with_what_would(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [text(16, 60, seed) for seed in range(3)]
    size = needed(batches, strategy=strategy)
    monkeypatch.setattr(plan, "available", lambda device: 0.6 * size)
    model = lorasb.patch(make("llama"), r=4)
    message = r"needs about .* above the weights and .* are available.*What would fit: batches of one"
    with pytest.raises(ValueError, match=message) as caught:
        lorasb.initialize(model, batches, lr=1e-3, strategy=strategy, progress=False)
    assert not any(value.any() for value in factors(model).values())
    assert "Nothing was changed" in str(caught.value)
    ones = [text(1, 60, seed) for seed in range(48)]
    lorasb.initialize(model, ones, lr=1e-3, strategy=strategy, progress=False)


def test_auto_takes_passes_where_boundaries_do_not_fit() -> None:
    given = {"batches": [text(1, 60, seed) for seed in range(60)], "memory_budget": "1.5MB", "num_samples": 60}
    _, report = started(**given)
    assert report.strategy == "accumulate"
    assert "boundaries of 2 blocks do not fit" in report.why
    with pytest.raises(ValueError, match="needs about"):
        started(**given, strategy="layerwise")


def test_fewer_samples_are_suggested_where_boundaries_are_what_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [text(1, 60, seed) for seed in range(400)]
    size = needed(batches)
    monkeypatch.setattr(plan, "available", lambda device: 0.3 * size)
    with pytest.raises(ValueError, match=r"num_samples=\d+ in batches of one") as caught:
        started(batches=batches, strategy="layerwise")
    count = int(str(caught.value).partition("num_samples=")[2].split()[0])
    _, report = started(batches=batches, strategy="layerwise", num_samples=count)
    assert report.num_samples == count < 400


@pytest.mark.parametrize(("spare", "count"), [(0.5, 0), (2.5, 2), (99.0, 5)])
def test_as_many_blocks_at_the_top_as_fit_are_not_recomputed(spare: float, count: int) -> None:
    work: Any = SimpleNamespace(layers={}, processes=SimpleNamespace(is_distributed=False))
    stack: Any = SimpleNamespace(blocks=[nn.Identity()] * 16, lowest=10)
    assert plan.uncut_blocks(work, stack, 100.0 * spare, 100.0) == count


def test_what_an_svd_and_a_default_budget_take_in_bytes() -> None:
    layer = SimpleNamespace(out_features=300, in_features=200, r={"default": 6})
    work: Any = SimpleNamespace(layers={"layer": layer}, options=SimpleNamespace(memory_budget=None))
    q = 6 + plan.OVERSAMPLE
    assert plan.factoring_bytes(work) == 4 * (200 * 200 + 3 * q * (300 + 200))
    sizes = plan.Sizes(400, 100, samples=8, rows=20, boundary=1, activations=50.0, head=10.0, masks=0.0)
    # twice the micro-batch of 20 samples of 50 tokens, less the 100 tokens of the largest one; at least 32 samples
    assert plan.sum_budget(work, sizes) == 60.0 * (50 * 40 - 100)
    assert plan.sum_budget(work, replace(sizes, rows=2)) == 60.0 * (50 * 32 - 100)


def test_the_estimate_is_shown_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        started(batches=SINGLES, progress=progress)
        shown = capsys.readouterr()
        assert ("lorasb: layerwise (2 blocks at model.layers): about " in shown.out) == progress
    assert shown.out == shown.err == ""


def held_at_calls(model: nn.Module) -> list[int]:
    """Bytes of loaded weights still referenced, also by autograd's graph; one entry per call of a linear."""
    live: dict[int, int] = {}
    held: list[int] = []

    def forward(module: nn.Module, plain: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
        storage = module.weight.untyped_storage()
        live[id(storage)] = storage.nbytes()
        weakref.finalize(storage, live.pop, id(storage), None)
        held.append(sum(live.values()))
        return plain(*args, **kwargs)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module._old_forward = partial(forward, module, module._old_forward)
    return held


@pytest.mark.parametrize("disk", [False, True])
def test_blocks_of_an_offloaded_model_come_and_go(disk: bool, tmp_path: Path) -> None:
    """At most one block's weights are loaded at a time, and the sums are plain autograd's."""
    base = make("llama")
    block = sum(p.numel() * p.element_size() for p in base.model.layers[0].parameters())
    disk_offload(base, str(tmp_path), "cpu") if disk else cpu_offload(base, "cpu")
    model = lorasb.patch(base, r=3)
    weights = {name: p for name, p in model.named_parameters() if "lorasb" not in name}
    assert all(p.is_meta for p in weights.values())
    held = held_at_calls(model)
    got, report = library_sums(model, SINGLES)
    assert report.strategy == "layerwise"
    assert not disk or 0 < max(held) <= block
    check_sums(got, autograd_sums("llama", SINGLES))
    assert all(model.get_parameter(name).is_meta for name in weights)


@pytest.mark.parametrize(
    ("mask", "bytes_"),
    [
        (None, 0.0),
        (torch.ones(2, 6), 0.0),  # no padding: no mask is expanded
        (torch.tensor([[1, 1, 0], [1, 1, 1]]), 2 * 3 * 3 * 4.0),
        (torch.zeros(2, 1, 3, 3), 0.0),  # already expanded by the caller
    ],
)
def test_a_mask_with_padding_is_expanded_by_the_model(mask: torch.Tensor | None, bytes_: float) -> None:
    batch = {"input_ids": torch.ones(2, 3).long()} | ({} if mask is None else {"attention_mask": mask})
    assert plan.mask_bytes(batch, 4) == bytes_
