"""A part of the rank held back, and filled from the gradient at the weights reached; the model computes what it did."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gradients import autograd_sums
from models import Batch, batches_for, logits, make, patched, text
from quantized_models import batches as quantized_batches
from quantized_models import quantized
from tolerances import FACTORS, FP64, ORTHONORMAL, check
from torch import Tensor, nn
from unfolded_models import TARGETS, Net, loss
from unfolded_models import batch as ids_and_targets

import lorasb
from lorasb.init.factorize import held
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with

KEPT = {"lorasb_R": (slice(2), slice(2)), "lorasb_B": (slice(None), slice(2)), "lorasb_A": slice(2)}  # of r = 4
FIRST, LATER = batches_for("llama", 3), [text(2, 12, seed) for seed in range(20, 24)]


@functools.cache
def made(dtype: torch.dtype, held_back: float, fields: tuple[tuple[str, Any], ...]) -> Any:
    options = {name: dict(value) if name == "rank_pattern" else value for name, value in fields}
    model = lorasb.patch(make("llama", dtype=dtype), r=4, **options)
    lorasb.initialize(model, FIRST, lr=2e-2, progress=False, held_back=held_back)
    optimizer = torch.optim.AdamW(cores(model), lr=3e-2)
    for batch in FIRST:
        step(model, optimizer, batch)
    return model.eval()


def trained(dtype: torch.dtype = torch.float64, held_back: float = 0.5, **fields: Any) -> Any:
    """A patched model with a part of its rank held back, after some steps."""
    return copy.deepcopy(made(dtype, held_back, tuple(fields.items())))


def step(model: Any, optimizer: Any, batch: Batch) -> None:
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def cores(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def refresh(model: Any, batches: Any = LATER, **options: Any) -> lorasb.InitReport:
    return lorasb.refresh(model, batches, **{"progress": False} | options)


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def gradients_at(model: Any, batches: list[Batch]) -> dict[str, Tensor]:
    """Σ_i ∇W L(x_i) by plain autograd, at dense weights with the adapter merged in."""
    return autograd_sums(copy.deepcopy(model).merge_and_unload(), batches)


def test_what_is_held_back_stays_empty_in_training() -> None:
    model = trained()
    for layer in layers_with(model, "default").values():
        b, core, a = (getattr(layer, f"lorasb_{name}")["default"] for name in "BRA")
        assert held(layer, "default") == 2
        assert core[:2, :2].any()
        assert not any(part.any() for part in (b[:, 2:], core[2:], core[:, 2:], a[2:]))


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.3, 3), (0.9, 1), (0.99, 1)])
def test_a_share_of_every_rank_is_held_back_and_one_direction_stays(share: float, kept: int) -> None:
    whole, part = (lorasb.patch(make("llama"), r=4) for _ in range(2))
    for model, held_back in ((whole, 0.0), (part, share)):
        lorasb.initialize(model, FIRST, lr=2e-2, progress=False, held_back=held_back)
    for a, b in zip(layers_with(whole, "default").values(), layers_with(part, "default").values(), strict=True):
        assert (held(a, "default"), held(b, "default")) == (0, 4 - kept)
        assert torch.equal(a.lorasb_B["default"][:, :kept], b.lorasb_B["default"][:, :kept])


def test_the_model_computes_what_it_did_and_only_empty_columns_changed() -> None:
    model = trained()
    before, learned, parameters = logits(model), state(model), list(model.parameters())
    refresh(model)
    assert torch.equal(logits(model), before)
    for name, value in state(model).items():
        kept = next((part for factor, part in KEPT.items() if factor in name), ...)
        assert torch.equal(value[kept], learned[name][kept])
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert set(model.peft_config) == {"default"}


def check_directions(model: Any, sums: dict[str, Tensor]) -> None:
    """The second half of r = 4 leads sign(G) outside of the first."""
    for name, layer in layers_with(model, "default").items():
        b, a = layer.lorasb_B["default"].double(), layer.lorasb_A["default"].double()
        u, s, vt = torch.linalg.svd(sums[name].sign())
        best = (u[:, :4] * s[:4]) @ vt[:4]
        for known, new, found in ((b[:, :2], b[:, 2:], best), (a[:2].t(), a[2:].t(), best.t())):
            outside = found - known @ (known.t() @ found)
            leading = torch.linalg.svd(outside).U[:, :2]
            check(new @ new.t(), leading @ leading.t(), FACTORS)
        check(b.t() @ b, torch.eye(4), ORTHONORMAL)
        check(a @ a.t(), torch.eye(4), ORTHONORMAL)


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_new_directions_lead_the_gradient_at_the_weights_reached(strategy: str) -> None:
    model = trained()
    sums = gradients_at(model, LATER)
    refresh(model, strategy=strategy)
    check_directions(model, sums)


def test_all_of_r_trains_afterwards_and_moments_go_on() -> None:
    model = trained()
    optimizer = torch.optim.AdamW(cores(model), lr=3e-2)
    step(model, optimizer, FIRST[0])
    moments = [optimizer.state[core]["exp_avg"].clone() for core in cores(model)]
    refresh(model)
    assert all(torch.equal(optimizer.state[c]["exp_avg"], m) for c, m in zip(cores(model), moments, strict=True))
    step(model, optimizer, LATER[0])
    assert all(bool((core != 0).all()) for core in cores(model))


@pytest.mark.parametrize("known", [True, False])
def test_new_entries_begin_at_the_mean_second_moment_where_the_optimizer_is_given(known: bool) -> None:
    """Zeros, after steps that have used up the correction of their bias, would make steps of several times the rate."""
    model = trained()
    optimizer = torch.optim.AdamW(cores(model), lr=1e-3)
    for i in range(60):
        step(model, optimizer, FIRST[i % 3])
    refresh(model, optimizer=optimizer if known else None)
    before = [core.detach().clone() for core in cores(model)]
    longest = torch.zeros(())
    for i in range(8):
        step(model, optimizer, LATER[i % 4])
        moved = [(core.detach() - old)[2:].abs().mean() / 1e-3 for core, old in zip(cores(model), before, strict=True)]
        before = [core.detach().clone() for core in cores(model)]
        longest = torch.maximum(longest, torch.stack(moved).mean())
    assert (longest < 0.6) == known
    for core in cores(model) if known else ():
        assert optimizer.state[core]["exp_avg_sq"].shape == core.shape


@pytest.mark.parametrize("update", ["sgd", "per-sample"])
@pytest.mark.parametrize("init", ["update", "random", "lora-xs"])
def test_any_start_is_filled_by_any_update(update: str, init: str) -> None:
    model = trained(init=init)
    before = logits(model)
    refresh(model, update=update)
    check(logits(model), before, FP64)
    for layer in layers_with(model, "default").values():
        b, a = layer.lorasb_B["default"], layer.lorasb_A["default"]
        assert held(layer, "default") == 0
        check(b[:, :2].t() @ b[:, 2:] / b.norm() ** 2, torch.zeros(2, 2), ORTHONORMAL)
        check(a[2:].norm() / 2**0.5, a[:2].norm() / 2**0.5, FACTORS)  # a rate means the same for both


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_stands_over_quantized_bases(kind: str) -> None:
    model = lorasb.patch(quantized(kind), r=4)
    lorasb.initialize(model, quantized_batches(), lr=1e-2, held_back=0.5, progress=False)
    before = logits(model)
    refresh(model, quantized_batches())
    assert torch.equal(logits(model), before)
    assert all(held(layer, "default") == 0 for layer in layers_with(model, "default").values())


def test_parameters_that_are_no_linears_are_filled() -> None:
    model, options = lorasb.patch(Net(), r=2, target_modules=TARGETS), {"loss_fn": loss, "progress": False}
    lorasb.initialize(model, [ids_and_targets()], lr=1e-2, held_back=0.5, **options)
    lorasb.refresh(model, [ids_and_targets(1)], **options)
    assert {held(layer, "default") for layer in layers_with(model, "default").values()} == {0}


def test_other_active_adapters_are_part_of_the_weights() -> None:
    model = trained()
    model.add_adapter("other", lorasb.LoRASBConfig(r=4))
    lorasb.initialize(model, LATER, lr=0.1, adapter_name="other", progress=False)
    model.base_model.set_adapter(["default", "other"])
    flags, before = [p.requires_grad for p in model.parameters()], logits(model)
    sums = gradients_at(model, LATER)
    refresh(model, adapter_name="default")
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.active_adapters == ["default", "other"]
    check_directions(model, sums)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(modules_to_save=("norm",))
    model.get_submodule("base_model.model.model.norm").requires_grad_(False)  # a head that does not train
    before, flags = state(model), [p.requires_grad for p in model.parameters()]

    def broken(model: Any, batch: Any) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        refresh(model, loss_fn=broken)
    writes = iter(range(5))
    written = LoRASBLinear.set_factors

    def interrupted(layer: Any, adapter: str, *factors: Tensor) -> None:
        if adapter == "default" and next(writes) == 4:
            raise KeyboardInterrupt
        written(layer, adapter, *factors)

    monkeypatch.setattr(LoRASBLinear, "set_factors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refresh(model)
    assert same(state(model), before)
    monkeypatch.setattr(LoRASBLinear, "set_factors", written)
    makes = iter(range(60))
    zeros = torch.zeros

    def exhausted(*shape: Any, **options: Any) -> Tensor:
        if next(makes) == 4:  # the second layer's B
            raise MemoryError("no memory left")
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", exhausted)
    with pytest.raises(MemoryError):
        refresh(model)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert same(state(model), before)
    assert all("default_later" not in layer.r for layer in layers_with(model, "default").values())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (model.active_adapters, set(model.peft_config)) == (["default"], {"default"})


@pytest.mark.parametrize("init", ["update", "random"])
def test_an_interrupt_while_a_part_is_emptied_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    model = trained(init=init, held_back=0.0)
    before, written, writes = state(model), LoRASBLinear.set_factors, iter(range(99))
    last = len(layers_with(model, "default")) - 1

    def interrupted(layer: Any, adapter: str, *factors: Tensor) -> None:
        if next(writes) == last:
            raise KeyboardInterrupt
        written(layer, adapter, *factors)

    monkeypatch.setattr(LoRASBLinear, "set_factors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorasb.initialize(model, LATER, lr=2e-2, progress=False, held_back=0.5)
    assert same(state(model), before)


def test_it_is_one_adapter_that_is_saved_before_and_after(tmp_path: Path) -> None:
    model = trained(rank_pattern=(("down_proj", 6),))
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(make("llama", dtype=torch.float64), tmp_path / name, is_trainable=True)
        assert torch.equal(logits(loaded.eval()), logits(model))
        if name == "before":
            refresh(model)
            refresh(loaded)
            assert same(state(loaded), state(model))
    provenance = loaded.peft_config["default"].init_provenance
    assert (provenance["held_back"], provenance["later"]["num_samples"]) == (0.5, 8)
    assert "lr" not in provenance["later"]


def test_other_samples_are_drawn_than_at_the_start() -> None:
    model = lorasb.patch(make("llama"), r=4)
    lorasb.initialize(model, FIRST, lr=1e-2, num_samples=3, held_back=0.5, progress=False)
    refresh(model, FIRST, num_samples=3)
    first = model.peft_config["default"].init_provenance
    assert first["data_sha256"] != first["later"]["data_sha256"]


def test_a_compiled_model_is_refreshed_too() -> None:
    model = trained()
    refresh(torch.compile(model, backend="eager"))
    assert all(held(layer, "default") == 0 for layer in layers_with(model, "default").values())


def test_what_cannot_be_held_back_or_filled_is_refused() -> None:
    model, whole = trained(), patched("llama", 4)
    with pytest.raises(ValueError, match="nothing of adapter 'default' is held back"):
        refresh(whole)
    with pytest.raises(ValueError, match="has not been initialized"):
        refresh(lorasb.patch(make("llama"), r=4))
    for option in ("cache", "held_back", "lr"):
        with pytest.raises(TypeError, match=f"refresh takes num_samples.*got '{option}'"):
            refresh(model, **{option: 0.5})
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="held_back is a share of the rank"):
            lorasb.initialize(whole, FIRST, lr=1e-2, held_back=share)
    with pytest.raises(ValueError, match="several tasks share a basis"):
        lorasb.initialize(whole, {"a": FIRST, "b": LATER}, lr=1e-2, held_back=0.5)
    with pytest.raises(ValueError, match="equivalent_gradient cannot divide by"):
        lorasb.initialize(lorasb.patch(make("llama"), r=4, equivalent_gradient=True), FIRST, lr=1e-2, held_back=0.5)
    with pytest.raises(ValueError, match="several tasks share a basis"):
        refresh(model, {"a": FIRST, "b": LATER})
    lorasb.add_adapters(model, ["task"])
    with pytest.raises(ValueError, match="is the basis of task"):
        refresh(model)
    model.delete_adapter("task")
    model.add_adapter("third", lorasb.LoRASBConfig(r=4))
    model.base_model.set_adapter(["default", "third"])
    with pytest.raises(ValueError, match="adapter 'third' has not been initialized"):
        refresh(model, adapter_name="default")
    model.add_adapter("second", lorasb.LoRASBConfig(r=4, init="random"))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="is not active"):
        refresh(model, adapter_name="default")


def test_beside_names_other_initialized_adapters() -> None:
    model = trained()
    with pytest.raises(ValueError, match="beside takes names"):
        lorasb.initialize(model, FIRST, lr=1e-2, beside="other")
    for name in ("other", "default"):
        with pytest.raises(ValueError, match="beside names initialized adapters"):
            lorasb.initialize(model, FIRST, lr=1e-2, beside=[name])
    model.add_adapter("other", lorasb.LoRASBConfig(r=4))
    with pytest.raises(ValueError, match="beside= requests another"):
        lorasb.initialize(model, FIRST, lr=1e-2, adapter_name="other", beside=["default"], cache="signs.safetensors")


@pytest.mark.parametrize("kind", ["sgd", "momentum", "muon"])
def test_an_optimizer_without_second_moments_goes_on(kind: str) -> None:
    """There is nothing for new entries to begin at; the step after a refresh is the optimizer's own."""
    model = trained(torch.float32)
    groups = lorasb.parameter_groups(model, lr=1e-2)
    optimizer: torch.optim.Optimizer = (
        lorasb.optim.Muon(groups) if kind == "muon" else torch.optim.SGD(groups, momentum=0.9 * (kind == "momentum"))
    )
    for batch in FIRST[:2]:
        step(model, optimizer, batch)
    refresh(model, optimizer=optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(model, optimizer, FIRST[0])
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, before[name]), name
