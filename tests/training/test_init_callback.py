"""InitCallback: the trainer's own data and schedule, nothing where it is done already, the same order of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gradients import factors
from models import make, patched
from tolerances import check_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from trainer_runs import ROWS, train

import lorasb


@pytest.mark.parametrize("warmup", [2, 0.5])  # steps, or their share
def test_the_same_as_initializing_by_hand(tmp_path: Path, warmup: float) -> None:
    callback = lorasb.InitCallback(num_samples=6, seed=5)
    model = lorasb.patch(make("llama"), r=4)
    train(model, tmp_path, [callback], warmup_steps=warmup)
    assert callback.report.lr == pytest.approx(1e-2 / 2)
    assert callback.report.num_samples == 6
    by_hand = lorasb.patch(make("llama"), r=4)
    report = lorasb.initialize(by_hand, DataLoader(ROWS, batch_size=3), lr=5e-3, num_samples=6, seed=5, progress=False)
    a, b = (([layer.energy_sign for layer in found.layers], found.loss) for found in (callback.report, report))
    assert a == b
    frozen = {name: value for name, value in factors(by_hand).items() if "lorasb_R" not in name}
    assert all(torch.equal(value, factors(model)[name]) for name, value in frozen.items())
    assert model.peft_config["default"].init_provenance["num_samples"] == 6


def test_the_order_of_training_stays(tmp_path: Path) -> None:
    """The global random state too: dropout would draw from it."""
    found = []
    for model, callbacks in ((patched(), []), (lorasb.patch(make("llama"), r=4), [lorasb.InitCallback()])):
        seen: list[Tensor] = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda embedding, args, seen=seen: seen.append(args[0].clone()) if embedding.training else None
        )
        train(model, tmp_path, callbacks)
        assert len(seen) == 4
        found.append([*seen, torch.get_rng_state()])
    check_equal(*found)


@pytest.mark.parametrize("make_one", [patched, lambda: lorasb.patch(make("llama"), r=4, init="lora-xs")])
def test_nothing_is_done_twice(make_one: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, callback = make_one(), lorasb.InitCallback()
    frozen = {name: value for name, value in factors(model).items() if "lorasb_R" not in name}
    train(model, tmp_path, [callback])
    assert callback.report is None
    assert all(torch.equal(value, factors(model)[name]) for name, value in frozen.items())


def test_copies_of_r_in_the_optimizer_are_refused(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    copies = [p.detach().clone().requires_grad_(True) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(copies, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ValueError, match=r"does not hold R of layer 'model\.layers\.0\..* \(14 of 14\).*before making"):
        train(model, tmp_path, [lorasb.InitCallback()], optimizers=(optimizer, schedule))
    assert not any(value.any() for value in factors(model).values())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(ROWS)


def test_a_stream(tmp_path: Path) -> None:
    callback = lorasb.InitCallback(num_samples=5)
    train(lorasb.patch(make("llama"), r=4), tmp_path, [callback], Stream())
    assert (callback.report.num_samples, callback.report.lr) == (5, pytest.approx(1e-2))


@pytest.mark.parametrize(
    ("count", "data", "adapted", "message"),
    [
        (None, Stream(), True, r"a stream: say how many samples, InitCallback\(num_samples=64\)"),
        (99, Stream(), True, "num_samples=99, but the batches hold 12 samples"),
        (99, ROWS, True, "num_samples=99, but the batches hold 12 samples"),
        (None, ROWS, False, r"call model = lorasb\.patch\(model\) first"),
    ],
)
def test_what_cannot_be_initialized(
    tmp_path: Path, count: int | None, data: object, adapted: bool, message: str
) -> None:
    model = lorasb.patch(make("llama"), r=4) if adapted else make("llama")
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, [lorasb.InitCallback(num_samples=count)], data)


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_what_the_trainer_does_to_a_model(tmp_path: Path, option: str) -> None:
    """accelerate wraps its forward; checkpointing makes the embeddings' output require a gradient."""
    callback = lorasb.InitCallback(num_samples=6)
    train(lorasb.patch(make("llama"), r=4), tmp_path, [callback], **{option: True})
    assert (callback.report.strategy, callback.report.num_samples) == ("layerwise", 6)
