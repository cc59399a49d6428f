"""`lorasb.patch`: which layers are adapted, at which rank, for which task; failures say why and change nothing."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapters import adapted, layers, trained, unchanged
from gradients import factors
from models import FAMILIES, SIZES, llama, logits, make, text
from tolerances import check_equal
from torch import nn
from trainer_runs import train

import lorasb
from lorasb.config.adapter import AdapterOptions


@pytest.mark.parametrize("family", FAMILIES)
def test_without_arguments_all_layers_but_heads_are_adapted_at_rank_64_or_their_own(family: str) -> None:
    model = lorasb.patch(make(family))
    found = layers(model)
    assert found
    ranks = {name: layer.r["default"] for name, layer in found.items()}
    assert ranks == {name: min(64, layer.in_features, layer.out_features) for name, layer in found.items()}
    saved = model.peft_config["default"]
    assert saved.r == 64
    assert set(saved.rank_pattern.values()) == set(ranks.values()) - {64}
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
    with pytest.raises(TypeError, match="expected a config or fields, got both: put r into the config"):
        lorasb.patch(nn.Linear(4, 4), config, r=4)


BAD_VALUES: dict[str, dict[str, object]] = {
    r"rank 33 is more than layer '.*\.0\.self_attn\.k_proj' allows: .*= 32.*rank_pattern=\{'k_proj': 32\}": {"r": 33},
    r"rank 40 is more than layer .*v_proj": {"r": 4, "rank_pattern": {"v_proj": 40}},
    "r must be a positive integer, got 0": {"r": 0},
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
def test_a_failed_patch_says_why(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = make("llama")
    with unchanged(model), pytest.raises(kind, match=message):
        lorasb.patch(model, **fields)
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
    """The weight would get both updates, or the module without an adapter would change as well."""
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


BATCHES = [text(1, 8, seed) for seed in range(2)]
LORA = peft.LoraConfig(r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_compiled_model_is_patched_first(way: str) -> None:
    model = make("llama")
    compiled = torch.compile(model, backend="eager") if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"not compiled yet.*torch\.compile\(lorasb\.patch\(model\)\)"):
        lorasb.patch(compiled)
    assert not layers(model)


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_patched_model_may_be_initialized_after_it_was_compiled(way: str) -> None:
    plain, model = lorasb.patch(make("llama"), r=4), lorasb.patch(make("llama"), r=4)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter) if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(backend=counter)
    lorasb.initialize(compiled, BATCHES, lr=1e-3, progress=False)
    assert counter.frame_count == 0
    lorasb.initialize(plain, BATCHES, lr=1e-3, progress=False)
    check_equal(factors(model), factors(plain))


def test_adapters_of_different_kinds_do_not_mix() -> None:
    model = lorasb.patch(make("llama"), r=4)
    for other in (LORA, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)):
        with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types.*LORASB"):
            model.add_adapter("second", other)
        assert torch.equal(logits(model), logits(make("llama")))
    with pytest.raises(ValueError, match="different peft types"):
        peft.get_peft_model(make("llama"), LORA).add_adapter("second", lorasb.LoRASBConfig(r=4))
    with pytest.raises(ValueError, match="PeftMixedModel"):
        peft.get_peft_model(make("llama"), lorasb.LoRASBConfig(r=4), mixed=True)


def test_nothing_that_requires_a_gradient(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"will not train, as no R.*model\.set_adapter\('default'\)"):
        lorasb.initialize(model, BATCHES, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient.*set_adapter"):
        lorasb.parameter_groups(model, lr=1e-3)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient: patch the model \(lorasb\.patch\)"):
        lorasb.parameter_groups(make("llama").requires_grad_(False), lr=1e-3)
    frozen = lorasb.patch(make("llama"), r=4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing would train: model\.set_adapter\('default'\)"):
        train(frozen, tmp_path, [lorasb.InitCallback()])


def test_factors_lie_where_their_layer_does() -> None:
    """A model on several devices: here one block is on the meta device."""
    base = make("llama")
    base.model.layers[1].to("meta")
    model = lorasb.patch(base, r=4)
    for layer in layers(model).values():
        assert len({p.device for p in (layer.base_layer.weight, *layer.parameters())}) == 1


def test_a_block_on_another_device_gets_its_input_there() -> None:
    """Initialization moves a block's recorded inputs through accelerate's hooks, as the model's own forward does."""
    plain, model = lorasb.patch(make("llama"), r=4), lorasb.patch(make("llama"), r=4)
    blocks: nn.ModuleList = model.get_base_model().model.layers
    for block in blocks:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for each in (plain, model):
        lorasb.initialize(each, BATCHES, lr=1e-3, progress=False)
    check_equal(factors(model), factors(plain))


ALL = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
O_OF_A_LAYER = {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}
TARGETS = {
    "list": ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}, {0, 1}),
    "regex": ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"mlp.up_proj", "mlp.down_proj"}, {1}),
    "exclude": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"self_attn.q_proj"}, {0, 1}),
    "exclude regex": ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"self_attn.q_proj"}, {1}),
    "layers": ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, {"self_attn.o_proj"}, {1}),
    "layer": (O_OF_A_LAYER, {"self_attn.o_proj"}, {0}),
    "all of a layer": ({"layers_to_transform": [1]}, ALL, {1}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_names_patterns_and_layers_choose_what_is_adapted(name: str) -> None:
    fields, kinds, blocks = TARGETS[name]
    want = {f"model.layers.{i}.{kind}" for i in blocks for kind in kinds}
    assert adapted(lorasb.patch(make("llama"), r=4, **fields)) == want


def test_rank_pattern_sets_ranks_by_name_and_regex() -> None:
    model = lorasb.patch(make("llama"), r=4, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7})
    for name, layer in layers(model).items():
        expected = 2 if name.endswith("k_proj") else 7 if name.endswith("1.mlp.up_proj") else 4
        assert layer.r["default"] == expected


def test_attention_that_reads_its_own_weights_is_left_alone_or_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert adapted(lorasb.patch(model, r=2)) == {"0"}
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"belongs to an nn\.MultiheadAttention"):
        lorasb.patch(model, r=2, target_modules=["out_proj"])


NAMES = (*SIZES, "num_key_value_heads")
ATTENTION = ["query", "key", "value", "attention.output.dense"]  # the layers of RoBERTa that the paper adapts
LLAMA, MISTRAL = (3072, 8192, 28, 24, 128_256, 8), (4096, 14336, 32, 32, 32_000, 8)
GEMMA, ROBERTA = (3584, 14336, 42, 16, 256_000, 8), (1024, 4096, 24, 16, 50_265, 16)
PAPER: dict[str, tuple[tuple[int, ...], dict[str, int], object, int, int]] = {
    "MistralForCausalLM": (MISTRAL, {}, "all-linear", 96, 2_064_384),
    "Gemma2ForCausalLM": (GEMMA, {"head_dim": 256}, "all-linear", 96, 2_709_504),
    "LlamaForCausalLM": (LLAMA, {}, "all-linear", 96, 1_806_336),
    "RobertaModel": (ROBERTA, {}, ATTENTION, 24, 55_296),
}


@pytest.mark.parametrize("kind", PAPER)
def test_trained_parameters_are_the_papers(kind: str) -> None:
    sizes, more, targets, r, count = PAPER[kind]
    with torch.device("meta"):
        config = getattr(transformers, kind).config_class(**dict(zip(NAMES, sizes, strict=True)), **more)
        base = getattr(transformers, kind)(config)
    model = lorasb.patch(base, r=r, target_modules=targets)
    cores = [p for n, p in model.named_parameters() if "lorasb_R" in n]
    assert sum(p.numel() for p in cores) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("roberta", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")])
def test_task_type_is_inferred(family: str, task: str) -> None:
    for wrap in (lorasb.patch, peft.get_peft_model):
        assert wrap(make(family), lorasb.LoRASBConfig(r=4)).peft_config["default"].task_type == task


def test_models_that_read_no_text_get_no_text_task() -> None:
    sides = {
        f"{s}_{n}": v
        for s in ("encoder", "decoder")
        for n, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
    }
    sizes = {"d_model": 32, "vocab_size": 99, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sides, **sizes, **tokens, suppress_tokens=None, begin_suppress_tokens=None)
    model = lorasb.patch(transformers.WhisperForConditionalGeneration(config), r=4).eval()
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 99, (2, 5))}
    lorasb.initialize(model, [batch], lr=1e-3, progress=False)
    assert torch.isfinite(model(**batch).loss)


def walks(depth: int) -> list[int]:
    """Count how often patching and unloading iterate over all modules of a model with `depth` targets."""
    net, walk = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))), nn.Module.named_modules
    with mock.patch.object(nn.Module, "named_modules", autospec=True, side_effect=walk) as counted:
        model = lorasb.patch(net, r=2, target_modules=r"\d+", init="random")
        patched = len(counted.call_args_list)
        model.unload()
    assert all(type(block) is nn.Linear for block in net)
    of_net = [call.args[0] is net for call in counted.call_args_list]
    return [sum(of_net[:patched]), sum(of_net[patched:])]


def test_the_walks_over_a_model_do_not_grow_with_its_targets() -> None:
    """Mixture-of-experts models have thousands of targets."""
    few = walks(3)
    assert min(few) > 0
    assert walks(30) == few


def test_a_property_of_an_adapter_reaches_its_layers_and_files(tmp_path: Path) -> None:
    """Adding one takes only a field of `AdapterOptions`."""
    given = {one.name: 0.25 if isinstance(one.default, float) else not one.default for one in fields(AdapterOptions)}
    model = lorasb.patch(make("llama"), r=4, init="kaiming", **given)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path, adapter_name="again")
    for name, one in (("default", model), ("again", loaded)):
        assert all(layer.adapters[name].options() == given for layer in layers(one).values())
        assert one.peft_config[name].options() == given
