"""Inits that need no data: their results; they run when an adapter is created, but not when it is loaded."""

from functools import partial
from pathlib import Path

import accelerate
import peft
import pytest
import tolerances
import torch
from adapters import check_training, layers, unchanged
from gradients import factors
from models import EXPERTS, batches_for, logits, make
from torch import nn

import lorasb
from lorasb.init import initialization

INITS = ["lora-xs", "lora-xs-output", "kaiming", "random"]


def reinitialized(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Set a patched model's factors to zero, and return those that `initialize` then makes."""
    for name, parameter in model.named_parameters():
        if "lorasb_" in name:
            parameter.data.zero_()
    lorasb.initialize(model, seed=seed, progress=False)
    return factors(model)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    tolerances.check_equal(found, wanted)
    assert any(value.any() for value in found.values())


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "factor_weight", lambda *_: pytest.fail("an init was run"))


@pytest.mark.parametrize(
    ("init", "way"), [*((init, "patch") for init in INITS), ("kaiming", "get_peft_model"), ("lora-xs", "inject")]
)
def test_an_adapter_is_ready_when_it_is_made(init: str, way: str) -> None:
    config, model, state = lorasb.LoRASBConfig(r=4, init=init), make("llama"), torch.get_rng_state()
    if way == "inject":
        model = peft.inject_adapter_in_model(config, model)
    else:
        model = (lorasb.patch if way == "patch" else peft.get_peft_model)(model, config)
    found = factors(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.is_initialized("default") for layer in layers(model).values())
    model.train()(**batches_for("llama")[0]).loss.backward()
    if way != "inject":
        same(found, reinitialized(model))
        facts = model.peft_config["default"].init_provenance
        assert (facts["init"], facts["seed"], facts["num_samples"]) == (init, 0, 0)


def test_the_seed_of_the_config_and_another_one_later() -> None:
    model = lorasb.patch(make("llama"), r=4, init="kaiming", init_seed=7)
    first = factors(model)
    assert model.peft_config["default"].init_provenance["seed"] == 7
    same(first, reinitialized(model, seed=7))
    other = reinitialized(model, seed=8)
    assert not any(torch.equal(value, other[name]) for name, value in first.items())
    with pytest.raises(ValueError, match="init_seed must be an integer >= 0, got -1"):
        lorasb.LoRASBConfig(init_seed=-1)


def test_a_second_adapter_and_the_update_init_waits_for_data() -> None:
    model = lorasb.patch(make("llama"), r=4)
    model.add_adapter("second", lorasb.LoRASBConfig(r=3, init="lora-xs"))
    for layer in layers(model).values():
        assert (layer.is_initialized("default"), layer.is_initialized("second")) == (False, True)
    assert model.active_adapters == ["default"]
    assert not any(layer.lorasb_R["second"].requires_grad for layer in layers(model).values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_computes_nothing(tmp_path: Path, low_cpu_mem_usage: bool, request: pytest.FixtureRequest) -> None:
    model = lorasb.patch(make("llama"), r=4, init="lora-xs")
    for layer in layers(model).values():
        layer.lorasb_R["default"].data.mul_(3000.0)
    model.save_pretrained(tmp_path)
    want = logits(model.eval())
    request.getfixturevalue("no_svd")
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded.eval()), want)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), want)
    assert set(loaded.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum").values()) == {0.0}
    plain = make("llama")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain.eval()), want)


@pytest.mark.usefixtures("no_svd")
def test_a_model_without_values_waits() -> None:
    with torch.device("meta"):
        model = lorasb.patch(make("llama"), r=4, init="lora-xs")
    assert not any(layer.is_initialized("default") for layer in layers(model).values())
    config = lorasb.LoRASBConfig(r=4, init="kaiming")
    model = peft.inject_adapter_in_model(config, make("llama"), low_cpu_mem_usage=True)
    assert not any(layer.is_initialized("default") for layer in layers(model).values())


@pytest.mark.parametrize("init", ["lora-xs", "random"])  # only the first reads W
def test_four_bits_and_experts(init: str) -> None:
    model = lorasb.patch(lorasb.quantize(make("llama")), r=4, init=init)
    same(factors(model), reinitialized(model))
    model = lorasb.patch(make("mixtral"), r=4, init=init, target_parameters=EXPERTS)
    assert sum(layer.is_initialized("default") for layer in layers(model).values()) == 2 * (4 + 2 * 4)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_weights_that_are_offloaded_are_brought_back(tmp_path: Path, how: str) -> None:
    want, base = factors(lorasb.patch(make("llama"), r=4, init="lora-xs")), make("llama")
    offload = accelerate.cpu_offload if how == "cpu" else partial(accelerate.disk_offload, offload_dir=str(tmp_path))
    offload(base, execution_device=torch.device("cpu"))
    model = lorasb.patch(base, r=4, init="lora-xs")
    same(factors(model), want)
    assert all(layer.base.parameter().is_meta for layer in layers(model).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float) -> None:
    model = make("llama")
    bad = model.model.layers[1].mlp.up_proj.weight
    bad.data[3, 2] = value
    message = r"weight of layer 'model\.layers\.1\.mlp\.up_proj' has NaN or Inf entries"
    with unchanged(model), pytest.raises(ValueError, match=message):
        lorasb.patch(model, r=4, init="lora-xs")
    bad.data[3, 2] = 0.0
    patched = lorasb.patch(model, r=4, init="lora-xs")
    bad.data[3, 2] = value
    with unchanged(patched), pytest.raises(ValueError, match="has NaN or Inf entries"):
        lorasb.initialize(patched, seed=1, progress=False)


@pytest.mark.parametrize("init", ["lora-xs", "lora-xs-output"])
def test_lora_xs_starts_from_the_weights_singular_vectors_and_a_small_r(init: str) -> None:
    """Σ is multiplied into A, as in the authors' code, or into B; the other factor is orthonormal."""
    model = lorasb.patch(make("llama"), r=4, init=init)
    report = lorasb.initialize(model, seed=1, progress=False)
    assert report.energy_sign is None
    for layer in layers(model).values():
        u, s, vt = torch.linalg.svd(layer.base.parameter().double())
        a, b, core = (getattr(layer, f"lorasb_{p}")["default"] for p in "ABR")
        scale = s[0]
        tolerances.check(b @ a / scale, u[:, :4] @ torch.diag(s[:4]) @ vt[:4] / scale, tolerances.FACTORS)
        flat, steep = (b.t(), a) if init == "lora-xs" else (a, b.t())
        tolerances.check(flat @ flat.t(), torch.eye(4), tolerances.ORTHONORMAL)
        tolerances.check(steep.norm(dim=1) / scale, s[:4] / scale, tolerances.FACTORS)
        assert 2e-6 < float(core.detach().std()) < 3e-5
        assert layer.scaling["default"] == 1.0  # alpha = r for language models


@pytest.mark.parametrize(("fields", "scaling"), [({}, 16 / 4), ({"lora_alpha": 8}, 2.0)])
def test_lora_xs_on_classification_has_alpha_16(fields: dict[str, int], scaling: float) -> None:
    for wrap in (lorasb.patch, peft.get_peft_model):
        model = wrap(make("roberta"), lorasb.LoRASBConfig(r=4, init="lora-xs", **fields))
        assert {layer.scaling["default"] for layer in layers(model).values()} == {scaling}


def test_kaiming_is_orthonormal_and_diagonal() -> None:
    for layer in layers(lorasb.patch(make("llama"), r=4, init="kaiming")).values():
        a, core = layer.lorasb_A["default"], layer.lorasb_R["default"]
        tolerances.check(a @ a.t(), torch.eye(4), tolerances.ORTHONORMAL)
        assert torch.equal(core, core.diag().diag())


def test_random_is_orthonormal_and_zero_and_repeatable() -> None:
    """It depends only on the seed and the layer's name: two base models get the same subspace."""
    models = [lorasb.patch(make("llama"), r=4, init="random", init_seed=3) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(2.0)
    lorasb.initialize(models[1], seed=3, progress=False)
    first, second = (factors(model) for model in models)
    same(first, second)
    for name, value in first.items():
        if "lorasb_R" in name:
            assert not value.any()
        else:
            side = value if "lorasb_A" in name else value.t()
            tolerances.check(side @ side.t(), torch.eye(4), tolerances.ORTHONORMAL)
    a = [value for name, value in first.items() if "lorasb_A" in name and "q_proj" in name]
    assert not torch.equal(a[0], a[1])


def test_random_trains_to_a_lower_loss() -> None:
    check_training(lorasb.patch(make("llama"), r=4, init="random"))
