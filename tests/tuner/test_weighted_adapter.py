"""Weighted sums of adapters: exact where A and B are shared, else the best of a rank with its error."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tolerances
import torch
from models import batches_for, logits, make, patched
from torch import Tensor
from two_adapters import layers, two

import lorasb
from lorasb.layers.linear import LoRASBLinear


def update(layer: LoRASBLinear, weights: dict[str, float]) -> Tensor:
    return sum(weight * layer.get_delta_weight(name).double() for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["auto", "linear"])
def test_adapters_that_share_factors_are_added_exactly(kind: str, tmp_path: Path) -> None:
    model = two(shared=True)
    errors = model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type=kind)
    assert set(errors.values()) == {0.0}
    assert model.active_adapters == ["default"]
    for layer in layers(model).values():
        assert torch.equal(layer.lorasb_A["sum"], layer.lorasb_A["default"])
        tolerances.check(
            layer.get_delta_weight("sum"), update(layer, {"default": 0.7, "second": -0.4}), tolerances.EXPORT
        )
    model.set_adapter("sum")
    after = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "sum").eval()
    tolerances.check(logits(again), after, tolerances.EXACT)


@pytest.mark.parametrize(("kind", "rank"), [("auto", None), ("svd", 2), ("svd", 5), ("cat", None)])
def test_others_are_the_best_of_a_rank_and_their_error_is_told(kind: str, rank: int | None) -> None:
    model = two(target_modules=["q_proj", "up_proj"])
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum", kind, rank)
    for name, layer in layers(model).items():
        names = {"default": 1.0} | ({"second": 0.5} if "second" in layer.lorasb_R else {})
        exact = update(layer, names)
        singular = torch.linalg.svdvals(exact)
        kept = layer.r["sum"]
        assert kept == (
            sum(layer.r[n] for n in names) if kind == "cat" else min(rank or 4, sum(layer.r[n] for n in names))
        )
        best = float(singular[kept:].norm() / singular.norm())
        found = float((layer.get_delta_weight("sum").double() - exact).norm() / exact.norm())
        assert abs(errors[name.removeprefix("base_model.model.")] - best) < tolerances.RANKS.atol
        assert abs(found - best) < tolerances.EXPORT.atol
        if kind == "cat":
            assert best < tolerances.RANKS.atol


def test_a_first_adapter_that_leaves_layers_out_adds_nothing_there() -> None:
    model = patched("llama", exclude_modules=["v_proj"])
    model.add_adapter("second", lorasb.LoRASBConfig(r=3))
    lorasb.initialize(model, batches_for("llama")[1:], lr=5e-2, adapter_name="second", progress=False)
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "cat")
    assert any(name.endswith("v_proj") for name in errors)
    for layer in layers(model).values():
        names = {name: 1.0 for name in ("default", "second") if name in layer.lorasb_R}
        tolerances.check(layer.get_delta_weight("sum"), update(layer, names), tolerances.EXPORT)


def test_what_cannot_be_combined_is_refused() -> None:
    model = two()
    with pytest.raises(ValueError, match="svd_rank must be positive"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "svd", -1)
    for arguments, message in (
        ((["default", "second"], [1.0, 1.0], "sum", "linear"), "do not share A and B"),
        ((["default", "second"], [1.0], "sum"), "a weight for each adapter"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "no layer has an adapter 'nobody'"),
        ((["default", "second"], [1.0, 1.0], "second"), "has an adapter 'second' already"),
        ((["default", "second"], [1.0, 1.0], "sum", "ties"), "combination_type must be one of auto, linear, svd, cat"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert set(model.peft_config) == {"default", "second"}
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.unmerge_adapter()
    model.add_adapter("third", lorasb.LoRASBConfig(r=2))
    with pytest.raises(ValueError, match="'third' has not been initialized"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum")
