"""`lorasb.patch`: a model of any family in, a PeftModel out; what cannot be patched says why and stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from adapters import adapted, layers, trained
from models import FAMILIES, llama, logits, make
from torch import nn

import lorasb


def snapshot(model: nn.Module) -> dict[str, object]:
    kinds = {name: type(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"kinds": kinds, "flags": flags, "peft": hasattr(model, "peft_config")}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_arguments_all_layers_but_heads_are_adapted_at_rank_64_or_their_own(family: str) -> None:
    model = lorasb.patch(make(family))
    found = layers(model)
    assert found
    assert {m.r["default"] for m in found.values()} == {min(64, m.in_features, m.out_features) for m in found.values()}
    heads = {"classifier", "score", "lm_head"}
    assert not any(set(name.split(".")) & heads for name in found)
    model.print_trainable_parameters()


def test_patch_is_get_peft_model() -> None:
    config = lorasb.LoRASBConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    first = peft.get_peft_model(make("llama"), copy.deepcopy(config))
    second = lorasb.patch(make("llama"), copy.deepcopy(config))
    third = lorasb.patch(make("llama"), r=4, target_modules=["q_proj"])
    assert type(first) is type(second) is type(third)
    assert adapted(first) == adapted(second) == adapted(third) != set()
    assert trained(first) == trained(second) == trained(third)


BAD_VALUES: dict[str, dict[str, object]] = {
    r"rank 33 is more than layer 'model\.layers\.0\.self_attn\.k_proj' allows: .*= 32.*rank_pattern=\{'k_proj': 32\}": {
        "r": 33
    },
    r"rank 40 is more than layer .*v_proj": {"r": 4, "rank_pattern": {"v_proj": 40}},
    "r must be a positive integer, got 0": {"r": 0},
    "r must be a positive integer, got -3": {"r": -3},
    "r must be at most 256, got 257": {"r": 257},
    r"r must be a positive integer, got 8\.0": {"r": 8.0},
    r"rank_pattern\['q_proj'\] must be a positive": {"rank_pattern": {"q_proj": 0}},
    r"qq_proj.* not found in the base model": {"target_modules": ["qq_proj"]},
    "No modules were targeted": {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    "init must be one of update, lora-xs, lora-xs-output, kaiming, random, got 'pissa'": {"init": "pissa"},
    r"lora_dropout must lie in \[0, 1\), got 1\.0": {"lora_dropout": 1.0},
    "target_modules: expected a regular expression": {"target_modules": "("},
    "lora_alpha belongs to init='lora-xs'": {"lora_alpha": 16},
    "give layers_to_transform too": {"layers_pattern": "layers"},
    "bias must be one of none, all, lorasb_only, lora_only, got 'some'": {"bias": "some"},
    "Invalid task type": {"task_type": "CHESS"},
}
SCALING, ALPHA = "scaling must be finite and not zero, from", "lora_alpha must lie between"
BAD_PATCHES = [
    *((fields, ValueError, message) for message, fields in BAD_VALUES.items()),
    *(({"scaling": value}, ValueError, SCALING) for value in (1e300, float("nan"), 0.0, "2")),
    *(({"init": "lora-xs", "lora_alpha": value}, ValueError, ALPHA) for value in (float("nan"), 0, -4.0)),
    *(
        ({"target_modules": ".*q_proj", "layers_to_transform": layers}, ValueError, "select the layers in the regex")
        for layers in (0, [1])
    ),
    ({"rank": 8}, TypeError, "LoRASBConfig has no field 'rank': did you mean"),
    ({"zzz": 8}, TypeError, "LoRASBConfig has no field 'zzz': known fields: .*target_modules"),
    ({"target_modules": ["input_layernorm"]}, TypeError, "is a LlamaRMSNorm: expected nn.Linear"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD_PATCHES, ids=lambda one: str(one) * isinstance(one, dict))
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_failed_patch_says_why_and_leaves_the_model_as_it_was(
    fields: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make("llama")
    before, answer = snapshot(model), logits(model)
    with pytest.raises(kind, match=message):
        lorasb.patch(model, **fields)
    assert snapshot(model) == before
    assert torch.equal(logits(model), answer)
    lorasb.patch(model, r=4)  # and it can still be patched


def test_one_configuration_serves_several_models() -> None:
    config = lorasb.LoRASBConfig()
    for wrap in (lorasb.patch, peft.get_peft_model):
        for seed in (0, 1):
            model = wrap(make("llama", seed=seed), config)
            assert model.peft_config["default"].base_fingerprint
            assert {layer.r["default"] for layer in layers(model).values()} == {32, 64}
    again = lorasb.patch(lorasb.patch(make("llama"), config).unload(), config)
    assert adapted(again)
    assert adapted(peft.get_peft_model(make("gpt2"), config))


def test_a_config_and_fields_together_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a config or fields, got both: put r into the config"):
        lorasb.patch(nn.Linear(4, 4), lorasb.LoRASBConfig(), r=4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_a_second_patch_is_refused() -> None:
    base = make("llama")
    model = lorasb.patch(base, r=4)
    names = adapted(model)
    with pytest.raises(ValueError, match=r"got a peft\.PeftModel.*model\.add_adapter"):
        lorasb.patch(model)
    with pytest.raises(ValueError, match=r"has an adapter 'default' already.*model\.unload\(\)"):
        lorasb.patch(base, r=4)
    assert adapted(model) == names


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_weights_of_unsupported_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"up_proj.* {dtype} weight.*lorasb.quantize quantized"):
        lorasb.patch(model, r=4)


@pytest.mark.parametrize("both", [True, False])
def test_a_weight_that_two_modules_share_is_not_merged_into(both: bool) -> None:
    """Each would add its update, or the other module get one that it does not have."""
    net = nn.ModuleDict({"one": nn.Linear(8, 8, bias=False), "two": nn.Linear(8, 8, bias=False)})
    net["two"].weight = net["one"].weight
    before = net["one"].weight.detach().clone()
    targets = ["one", "two"] if both else ["one"]
    model: Any = lorasb.patch(net, r=2, target_modules=targets, init="kaiming")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="expected a separate weight to merge into, got one that"):
            merge()
    assert torch.equal(model.base_model.model["one"].base_layer.weight, before)
    assert not torch.nn.utils.parametrize.is_parametrized(model.unload()["one"])
