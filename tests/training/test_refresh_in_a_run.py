"""`InitCallback(refresh_at=)`: what is held back is filled at its step, and a stopped run resumes to the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gradients import factors
from models import make
from trainer_runs import ROWS, train

import lorasb
from lorasb.init.factorize import held
from lorasb.layers.lookup import layers_with


def run(folder: Path, callback: Any = None, adapter_name: str = "default", **options: Any) -> Any:
    callback = callback or lorasb.InitCallback(num_samples=6, refresh_at=4)
    model = lorasb.patch(make("llama"), r=4, adapter_name=adapter_name)
    train(model, folder, [callback], **{"max_steps": 8, "save_steps": 1} | options)
    return model


def same(a: Any, b: Any) -> bool:
    one, other = factors(a), factors(b)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def loaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(make("llama"), folder)


def empty(model: Any) -> set[int]:
    name = model.active_adapters[0]
    return {held(layer, name) for layer in layers_with(model, name).values()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a run of eight steps with a refresh at the fourth, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_half_is_held_back_until_the_step(whole: tuple[Path, Any]) -> None:
    folder, model = whole
    assert empty(loaded(folder / "checkpoint-4")) == {2}
    assert empty(loaded(folder / "checkpoint-5")) == empty(model) == {0}
    first, last = (loaded(folder / f"checkpoint-{step}") for step in (4, 8))
    for a, b in zip(layers_with(first, "default").values(), layers_with(last, "default").values(), strict=True):
        assert torch.equal(a.lorasb_B["default"][:, :2], b.lorasb_B["default"][:, :2])


def test_it_trains_as_by_hand(tmp_path: Path) -> None:
    """The same samples, by the seed after the run's own."""
    run(tmp_path, lorasb.InitCallback(num_samples=6, refresh_at=4, refresh_samples=5))
    model = loaded(tmp_path / "checkpoint-4")
    loader = torch.utils.data.DataLoader(ROWS, batch_size=3)
    lorasb.refresh(model, loader, num_samples=5, seed=4, progress=False)
    by_hand, by_run = (layers_with(m, "default").values() for m in (model, loaded(tmp_path / "checkpoint-5")))
    for a, b in zip(by_hand, by_run, strict=True):
        assert torch.equal(a.lorasb_A["default"], b.lorasb_A["default"])
        assert torch.equal(a.lorasb_B["default"], b.lorasb_B["default"])


@pytest.mark.parametrize("stop", [2, 4, 6])  # before the refresh, just before it and after it
def test_a_run_that_is_stopped_resumes_to_the_same_bits(whole: tuple[Path, Any], tmp_path: Path, stop: int) -> None:
    assert empty(whole[1]) == {0}
    assert same(whole[1], run(tmp_path, resume=str(whole[0] / f"checkpoint-{stop}")))


def test_an_adapter_of_another_name_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """PEFT saves it in a folder of its own."""
    model = run(tmp_path / "whole", adapter_name="other")
    resume = str(tmp_path / "whole" / "checkpoint-6")
    assert same(model, run(tmp_path / "resumed", adapter_name="other", resume=resume))


def test_the_order_of_rows_is_that_of_a_run_without_it(whole: tuple[Path, Any], tmp_path: Path) -> None:
    run(tmp_path, lorasb.InitCallback(num_samples=6, held_back=0.5))
    for step, expected in ((4, True), (6, False)):
        assert same(*(loaded(folder / f"checkpoint-{step}") for folder in (whole[0], tmp_path))) == expected


def test_a_second_run_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    trainer = train(model, tmp_path, [lorasb.InitCallback(num_samples=6, refresh_at=2)])
    before = factors(model)
    trainer.train()
    moved = {name for name, value in factors(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lorasb_R" in name}


@pytest.mark.parametrize(("best", "expected"), [(2, {2}), (6, {0})])
def test_the_best_checkpoint_may_be_of_a_step_before(tmp_path: Path, best: int, expected: set[int]) -> None:
    class Judge(lorasb.InitCallback):
        """Says that the checkpoint of one step is the best."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_save(args, state, control, **kwargs)
            state.best_model_checkpoint = str(tmp_path / f"checkpoint-{best}")

    asked = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    model = run(tmp_path, Judge(num_samples=6, refresh_at=4), **asked)
    assert empty(model) == expected
    assert same(model, loaded(tmp_path / f"checkpoint-{best}"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"refresh_at": 0}, "refresh_at is a whole number from 1 on"),
        ({"refresh_at": 2.5}, "refresh_at is a whole number from 1 on"),
        ({"refresh_at": 4, "refresh_samples": -1}, "refresh_samples is a whole number from 1 on"),
        ({"refresh_samples": 8}, "give refresh_at too"),
        ({"refresh_at": 4, "cache": "signs.safetensors"}, "leave cache out"),
        ({"refresh_at": 4, "samples": iter([])}, "read once"),
        ({"refresh_at": 4, "loss_fn": lorasb.preference_loss}, "at the base alone"),
        ({"refresh_at": 4, "loss_fn": partial(lorasb.preference_loss)}, "at the base alone"),
    ],
)
def test_no_run_can_make_such_a_refresh(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lorasb.InitCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"refresh_at": 8}, "beyond the run, which has 8 steps: 1 to 7"),
        ({"refresh_at": 4, "refresh_samples": 100}, "100"),
        ({"refresh_at": 4, "held_back": 0.0}, "nothing of adapter 'default' is held back"),
        ({"refresh_at": 4, "held_back": 0.1}, "nothing of adapter 'default' is held back"),
    ],
)
def test_what_the_run_cannot_give_is_refused_at_its_begin(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(tmp_path, lorasb.InitCallback(num_samples=6, **arguments))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_adapter_that_holds_nothing_back_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4, init="random")
    with pytest.raises(ValueError, match="nothing of adapter 'default' is held back"):
        train(model, tmp_path, [lorasb.InitCallback(refresh_at=2)])
    lorasb.initialize(model, held_back=0.5)
    train(model, tmp_path, [lorasb.InitCallback(refresh_at=2)])
    assert empty(model) == {0}


@pytest.mark.parametrize(("at", "says"), [(None, "refresh_at is not set"), (3, "refresh_at=3 has already passed")])
def test_a_run_that_resumes_and_leaves_a_part_empty_warns(
    whole: tuple[Path, Any], tmp_path: Path, at: int | None, says: str
) -> None:
    with pytest.warns(UserWarning, match=says):
        model = run(tmp_path, lorasb.InitCallback(refresh_at=at), resume=str(whole[0] / "checkpoint-4"))
    assert empty(model) == {2}


def test_a_run_goes_on_from_its_first_step(tmp_path: Path) -> None:
    """Step 1: nothing but the start, and the optimizer's first moments, has been there before."""
    whole = run(tmp_path / "whole", lorasb.InitCallback(num_samples=6))
    one = lorasb.InitCallback(num_samples=6)
    assert same(whole, run(tmp_path / "resumed", one, resume=str(tmp_path / "whole" / "checkpoint-1")))
