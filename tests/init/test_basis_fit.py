"""`lorasb.basis_fit` against explicit matrices in fp64; the model is left as it was."""

import pytest
import torch
from adapters import layers, unchanged
from models import Batch, make, started, text
from peft import PeftModel

import lorasb

TASK, OTHER = ([text(2, 12, seed) for seed in seeds] for seeds in (range(4), range(20, 24)))
R = 4


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return started(r=R, batches=TASK)[0]


def fit(model: PeftModel, batches: list[Batch] = OTHER, **options: object) -> lorasb.BasisFit:
    return lorasb.basis_fit(model, batches, progress=False, **options)


def test_shares_are_those_of_matrices(model: PeftModel) -> None:
    found = fit(model)
    own, _ = started(r=R, batches=OTHER, lr=1.0, longest_start=None)
    kept, whole, chance = 0.0, 0.0, 0.0
    for name, layer in layers(own).items():
        delta = layer.get_delta_weight("default").double()
        b, a = (getattr(layers(model)[name], f"lorasb_{part}")["default"].double() for part in "BA")
        projected = b @ b.t() @ delta @ a.t() @ a
        share = float(projected.square().sum() / delta.square().sum())
        assert found.by_layer[name] == pytest.approx(share, rel=1e-4)
        kept, whole = kept + float(projected.square().sum()), whole + float(delta.square().sum())
        chance += float(delta.square().sum()) * R**2 / delta.numel()
    assert found.share == pytest.approx(kept / whole, rel=1e-4)
    assert found.random == pytest.approx(chance / whole, rel=1e-6)
    with torch.no_grad():  # both rows of these batches have equally many labels
        losses = [float(make("llama")(**batch).loss) for batch in OTHER]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 < found.random < found.share < 1


@pytest.mark.parametrize("init", ["random", "lora-xs"])
def test_a_basis_without_data_keeps_a_part(init: str) -> None:
    assert 0 < fit(lorasb.patch(make("llama"), r=R, init=init)).share < 0.5


@pytest.mark.parametrize("update", ["sgd", "per-sample"])
def test_other_updates_have_other_first_steps(model: PeftModel, update: str) -> None:
    share = fit(model, update=update).share
    assert 0 < share < 1
    assert share != fit(model).share


def test_the_model_is_left_as_it_was() -> None:
    model = started(r=R, batches=TASK)[0].train()
    model.add_adapter("ada", lorasb.LoRASBConfig(basis="default"))
    model.set_adapter("ada")
    with unchanged(model):
        assert fit(model).share == fit(model).share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "nobody"}, "no layer has an adapter 'nobody'"),
        ({"num_samples": 9}, "9"),
        ({"model": lorasb.patch(make("llama"), r=R)}, "adapter 'default' has not been initialized"),
    ],
)
def test_an_error_changes_nothing(model: PeftModel, options: dict[str, object], message: str) -> None:
    with unchanged(model), pytest.raises(ValueError, match=message):
        fit(**{"model": model} | options)
