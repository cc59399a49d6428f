"""Models in 4 and 8 bits, bitsandbytes' and our own: initialized, trained, saved, exported, merged as their dense twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import twins
from quantized_models import KINDS, dense_twin, initialized, quantized

import lorasb


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_dequantized_twin_in_forward_and_gradients(kind: str) -> None:
    base = quantized(kind)
    dense = dense_twin(base)
    twins.check_gradients(lorasb.patch(base, r=4), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_both_strategies_give_the_same_factors(kind: str) -> None:
    twins.check_equal(*(twins.factors(initialized(kind, strategy)) for strategy in ("layerwise", "accumulate")))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_take_turns_and_the_storage_stays(kind: str) -> None:
    model = initialized(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    assert any("SCB" in name or "absmax" in name for name in before)
    twins.check_training(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "kind", ["own nested", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("nf4", "int8"))]
)
def test_a_resumed_trainer_ends_in_the_same_factors(kind: str, tmp_path: Path) -> None:
    twins.check_resuming(lambda: initialized(kind), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    twins.check_files(initialized(kind).eval(), quantized(kind), dense_twin(quantized(kind)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_dense_layers_and_unmerging_the_storage_back(kind: str) -> None:
    twins.check_merging(initialized(kind).eval())
