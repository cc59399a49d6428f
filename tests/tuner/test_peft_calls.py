"""PEFT calls every tuner supports: biases, token rows, injection by a state dict, dtypes, several adapters, merging."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import layers, unchanged
from models import batches_for, llama, logits, make, patched
from networks import Mlp, X
from peft.helpers import disable_input_dtype_casting
from tolerances import BF16_FEW, EXACT, EXPORT, HALF_FEW, MERGE, check, check_scaled
from torch import nn

import lorasb


def trained_besides_r(model: nn.Module) -> set[str]:
    names = (name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad)
    return {name for name in names if "lorasb_R" not in name}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("all", {"first.base_layer.bias", "second.base_layer.bias", "head.bias"}),
        ("lorasb_only", {"first.base_layer.bias", "second.base_layer.bias"}),
        ("lora_only", {"first.base_layer.bias", "second.base_layer.bias"}),
    ],
)
def test_biases_are_trained_saved_loaded_and_exported(bias: str, expected: set[str], tmp_path: Path) -> None:
    model = lorasb.patch(Mlp(), r=2, target_modules=["first", "second"], init="kaiming", bias=bias)
    assert trained_besides_r(model) == expected
    model.train()(X).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    want = model.eval()(X)
    model.save_pretrained(tmp_path / "adapter")
    check(peft.PeftModel.from_pretrained(Mlp(), tmp_path / "adapter").eval()(X), want, EXACT)
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    check(peft.PeftModel.from_pretrained(Mlp(), tmp_path / "lora").eval()(X), want, EXPORT)


def test_gradients_of_biases_are_those_of_a_merged_model() -> None:
    fields = {"r": 2, "target_modules": ["first"], "init": "kaiming"}
    frozen, model = (lorasb.patch(Mlp(), bias=bias, **fields) for bias in ("none", "lorasb_only"))
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    for one in (frozen, model, plain):
        one(X).square().sum().backward()
    layer, other = model.base_model.model.first, frozen.base_model.model.first
    check(layer.base_layer.bias.grad, plain.first.bias.grad, EXPORT)
    check(layer.lorasb_R["default"].grad, other.lorasb_R["default"].grad, EXPORT)


def test_rows_of_the_embedding_train_beside_the_adapter(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4, init="kaiming", trainable_token_indices=[3, 7])
    assert any("token_adapter" in name for name in trained_besides_r(model))
    batch = batches_for("llama")[0]
    model.train()(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    check(logits(peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()), want, EXACT)


def test_a_tied_head_follows_the_embedding_that_is_saved() -> None:
    model = lorasb.patch(llama(), r=4, init="random", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    base: Any = model.base_model.model
    embedding = base.model.embed_tokens.modules_to_save["default"].weight
    assert base.lm_head.modules_to_save["default"].weight is embedding


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_injection_by_a_state_dict_caps_and_takes_ranks(prefix: str) -> None:
    """PEFT passes a state dict if a checkpoint has lost its config; names may come from a compiled model."""
    saved = peft.get_peft_model_state_dict(lorasb.patch(Mlp(), r=3, target_modules=["first", "second"], init="random"))
    state = {prefix + key.removeprefix("base_model.model."): value for key, value in saved.items()}
    config = lorasb.LoRASBConfig(target_modules=["first"])
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['second'\]"):
        model = peft.inject_adapter_in_model(config, Mlp(), state_dict=state)
    assert {name: layer.r["default"] for name, layer in layers(model).items()} == {"first": 3, "second": 3}
    plain = peft.inject_adapter_in_model(lorasb.LoRASBConfig(target_modules=["first", "second"]), Mlp())
    assert {name: layer.r["default"] for name, layer in layers(plain).items()} == {"first": 10, "second": 12}
    config = lorasb.LoRASBConfig(target_modules=["first", "second"], rank_pattern={"second": 2}, init="random")
    model = peft.inject_adapter_in_model(config, torch.compile(Mlp(), backend="eager"))
    assert sorted(layer.r["default"] for layer in layers(model).values()) == [2, 10]


def test_input_casting_can_be_switched_off() -> None:
    model = lorasb.patch(Mlp().to(torch.bfloat16), r=2, target_modules=["first"], init="random")
    layer: Any = model.base_model.model.first
    x = torch.randn(3, 10)
    assert layer.base.cast(x).dtype == torch.bfloat16
    with disable_input_dtype_casting(model):
        assert layer.base.cast(x).dtype == torch.float32
    assert layer.base.cast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: dataclasses.replace(config, r=2)])
def test_a_copy_of_a_models_config_makes_a_new_adapter(copied: Any) -> None:
    """Its provenance is the first adapter's, but the second one is initialized all the same."""
    model = lorasb.patch(Mlp(), r=2, target_modules=["first", "second"], init="random")
    assert model.peft_config["default"].init_provenance is not None
    model.add_adapter("second", copied(model.peft_config["default"]))
    assert all(layer.is_initialized("second") for layer in layers(model).values())


@pytest.mark.filterwarnings("ignore")
def test_a_second_adapter_does_not_take_an_adapted_pooler_for_a_fresh_one() -> None:
    model = lorasb.patch(make("bert"), r=2, init="random")
    before = set(model.peft_config["default"].modules_to_save or [])
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, init="random"))
    assert set(model.peft_config["second"].modules_to_save or []) == before


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_adapter_dtype_says_what_r_is_in(autocast: bool, base: torch.dtype, tmp_path: Path) -> None:
    """As in PEFT, R is in fp32 or in the base's dtype; the file is in fp32 either way, all else in the base's dtype."""
    config = lorasb.LoRASBConfig(r=2, target_modules=["first", "second"], init="kaiming")
    model = peft.get_peft_model(Mlp().to(base), config, autocast_adapter_dtype=autocast)
    model.add_adapter("other", config, autocast_adapter_dtype=autocast)
    want, x = torch.float32 if autocast else base, X.to(base)
    model.train()(x).float().square().sum().backward()
    assert all(p.grad.dtype == want and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    after = model.eval()(x)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": autocast, "is_trainable": True}
    model.load_adapter(tmp_path, "loaded", **options)
    loaded, lazy = (
        peft.PeftModel.from_pretrained(Mlp().to(base), tmp_path, low_cpu_mem_usage=cheap, **options).eval()
        for cheap in (False, True)
    )
    for one in (model, loaded, lazy):
        check(one(x), after, EXACT)
        assert trained_besides_r(one) == set()
        for name, parameter in one.named_parameters():
            assert parameter.dtype == (want if "lorasb_R" in name else base), name
    check(model.merge_and_unload()(x), after, BF16_FEW if base != torch.float32 else MERGE)


def test_factors_are_kept_in_fp32_on_request(tmp_path: Path) -> None:
    """The adapter then computes in fp32 although the base does not, closer to fp64 than with factors in bf16."""
    errors, x = {}, torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for wide in (False, True):
        model = lorasb.patch(Mlp().to(torch.bfloat16), r=2, target_modules=["first"], init="kaiming", wide_factors=wide)
        layer: Any = model.base_model.model.first
        dtype = torch.float32 if wide else torch.bfloat16
        assert {layer.lorasb_A["default"].dtype, layer.lorasb_B["default"].dtype} == {dtype}
        whole = lorasb.patch(Mlp().double(), r=2, target_modules=["first"], init="kaiming").base_model.model.first
        update = layer.adapter_forward(x, "default").detach().double()
        errors[wide] = float((update - x.double() @ whole.get_delta_weight("default").t()).norm())
    assert errors[True] < errors[False] / 10
    assert layer(x).dtype == torch.bfloat16
    model.train()(x).float().sum().backward()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Mlp().to(torch.bfloat16), tmp_path).eval()
    check(again(x), model.eval()(x), EXACT)
    assert again.base_model.model.first.lorasb_A["default"].dtype == torch.float32


def test_no_file_is_loaded_into_a_merged_adapter(tmp_path: Path) -> None:
    """Unmerging would subtract another update than was added."""
    model = patched()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the weights: call model\.unmerge_adapter"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("call", "value"), [("merge_adapter", float("nan")), ("merge_and_unload", float("inf"))])
def test_one_broken_layer_leaves_every_weight_as_it_was(call: str, value: float, safe: bool) -> None:
    model = patched()
    *_, last = layers(model).values()
    last.lorasb_R["default"].data[0, 0] = value
    message = r"layers\.1\.mlp\.down_proj: .*not finite in torch\.float32; the weights were left as they are"
    with unchanged(model), pytest.raises(ValueError, match=message):
        getattr(model, call)(safe_merge=safe)


def test_before_initialization_the_equivalent_gradient_changes_nothing_either() -> None:
    want = logits(make("llama"))
    model = lorasb.patch(make("llama"), r=4, equivalent_gradient=True).eval()
    assert torch.equal(logits(model), want)
    found = model(**batches_for("llama", count=1)[0])  # evaluation mode, with gradients
    assert torch.equal(found.logits.detach(), want)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        found.loss.backward()


def test_a_merged_quantized_base_takes_what_it_took_before() -> None:
    model = lorasb.patch(lorasb.quantize(make("llama", dtype=torch.bfloat16)), r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    layer, x = next(iter(layers(model).values())), torch.randn(3, 64)
    before = layer(x)
    model.merge_adapter()
    assert layer(x).dtype == before.dtype == torch.float32
    check_scaled(layer(x), before.detach(), HALF_FEW)
