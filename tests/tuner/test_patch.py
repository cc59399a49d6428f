"""Patching: what people rely on in PEFT, on tiny models of real families."""

from __future__ import annotations

import copy

import peft
import pytest
import tolerances
import torch
import transformers
from models import FAMILIES, SIZES, batches_for, llama, logits, make, patched
from torch import nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def adapted(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, object]:
    kinds = {name: type(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"kinds": kinds, "flags": flags, "peft": hasattr(model, "peft_config")}


@pytest.mark.parametrize("family", FAMILIES)
def test_bare_patch_initialize_train_merge(family: str) -> None:
    model = make(family)
    before = logits(model, family)
    model = lorasb.patch(model, r=4)
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(logits(model, family), before)
    lorasb.initialize(model, batches_for(family), lr=1e-3, progress=False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches_for(family):
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    after = logits(model, family)
    assert (after - before).abs().max() > 1e-4
    merged = model.merge_and_unload()
    assert not adapted(merged)
    tolerances.check(logits(merged, family), after, tolerances.MERGE)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_without_arguments(family: str) -> None:
    model = lorasb.patch(make(family))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    assert layers
    assert {m.r["default"] for m in layers.values()} == {
        min(64, m.in_features, m.out_features) for m in layers.values()
    }
    heads = {"classifier", "score", "lm_head"}
    assert not any(set(name.split(".")) & heads for name in layers)
    model.print_trainable_parameters()


def test_the_default_rank_is_64_and_is_capped_and_saved() -> None:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=9,
    )
    model = lorasb.patch(transformers.LlamaForCausalLM(config))
    ranks = {n.rpartition(".")[2]: m.r["default"] for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    assert ranks["q_proj"] == ranks["up_proj"] == 64
    assert ranks["k_proj"] == ranks["v_proj"] == 32
    saved = model.peft_config["default"]
    assert saved.r == 64
    assert set(saved.rank_pattern.values()) == {32}


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gemma2", "CAUSAL_LM"), ("roberta", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]
)
def test_task_type_is_inferred(family: str, task: str) -> None:
    assert lorasb.patch(make(family), r=4).peft_config["default"].task_type == task


def test_patch_is_get_peft_model() -> None:
    config = lorasb.LoRASBConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    first = peft.get_peft_model(make("llama"), copy.deepcopy(config))
    second = lorasb.patch(make("llama"), copy.deepcopy(config))
    third = lorasb.patch(make("llama"), r=4, target_modules=["q_proj"])
    assert type(first) is type(second) is type(third)
    assert adapted(first) == adapted(second) == adapted(third) != set()
    assert trained(first) == trained(second) == trained(third)


TARGETS = {
    "list": ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}, {0, 1}),
    "regex": ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"mlp.up_proj", "mlp.down_proj"}, {1}),
    "exclude": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"self_attn.q_proj"}, {0, 1}),
    "exclude regex": ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"self_attn.q_proj"}, {1}),
    "layers": ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, {"self_attn.o_proj"}, {1}),
    "layer": (
        {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"self_attn.o_proj"}, {0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    fields, kinds, layers = TARGETS[name]
    assert adapted(lorasb.patch(make("llama"), r=4, **fields)) == {
        f"model.layers.{i}.{k}" for i in layers for k in kinds
    }


def test_rank_pattern_by_name_and_regex() -> None:
    model = lorasb.patch(make("llama"), r=4, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7})
    ranks = {n: m.r["default"] for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    for name, rank in ranks.items():
        expected = 2 if name.endswith("k_proj") else 7 if name.endswith("1.mlp.up_proj") else 4
        assert rank == expected


def test_a_classification_head_is_trained_whole_and_never_adapted() -> None:
    for model in (lorasb.patch(make("roberta"), r=4), peft.get_peft_model(make("roberta"), lorasb.LoRASBConfig(r=4))):
        assert "classifier" in model.peft_config["default"].modules_to_save
        names = trained(model)
        assert any("classifier.modules_to_save.default.out_proj" in name for name in names)
        assert all("lorasb_R.default" in name or "modules_to_save" in name for name in names)
        assert not any("classifier" in name for name in adapted(model))


def test_a_classification_model_saves_its_head_and_merges(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = patched("roberta")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].out_proj.bias.add_(1.0)
    want = logits(model, "roberta")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("roberta"), tmp_path)
    assert torch.equal(logits(again, "roberta"), want)
    merged = model.merge_and_unload()
    assert isinstance(merged, transformers.RobertaForSequenceClassification)
    tolerances.check(logits(merged, "roberta"), want, tolerances.MERGE)


def test_modules_to_save() -> None:
    model = lorasb.patch(make("llama"), r=4, modules_to_save=["model.norm"])
    assert {"base_model.model.model.norm.modules_to_save.default.weight"} == {
        name for name in trained(model) if "lorasb_R" not in name
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_after_patch_load_and_add_adapter(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = patched(dtype=dtype)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", lorasb.LoRASBConfig(r=2))
    model.load_adapter(tmp_path, "third", is_trainable=True)
    loaded = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path, is_trainable=True)
    lazy = peft.PeftModel.from_pretrained(
        make("llama", dtype=dtype), tmp_path, low_cpu_mem_usage=True, is_trainable=True
    )
    for candidate in (model, loaded, lazy):
        for name, parameter in candidate.named_parameters():
            if "lorasb_R" in name:
                assert parameter.dtype == torch.float32, name
            else:
                assert not parameter.requires_grad, name
                assert parameter.dtype == dtype, name
    assert (
        {n.rpartition(".")[2] for n in trained(loaded)} == {n.rpartition(".")[2] for n in trained(lazy)} == {"default"}
    )


def test_several_adapters() -> None:
    model = patched()
    first = logits(model)
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, target_modules=["q_proj", "up_proj"]))
    lorasb.initialize(model, batches_for("llama"), lr=3e-2, adapter_name="second", progress=False)
    tolerances.check(logits(model), first, tolerances.EXACT)
    model.set_adapter("second")
    second = logits(model)
    assert (second - first).abs().max() > 1e-3
    assert all("second" in name for name in trained(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name in trained(model))


def test_disable_adapter() -> None:
    model = patched()
    base, with_adapter = logits(make("llama")), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter)
    assert (with_adapter - base).abs().max() > 1e-3


@pytest.mark.parametrize("safe", [True, False])
def test_merge_adapter_and_unmerge(safe: bool) -> None:
    model = patched()
    want, base = logits(model), logits(make("llama"))
    model.merge_adapter(safe_merge=safe)
    tolerances.check(logits(model), want, tolerances.MERGE)
    with model.disable_adapter():
        tolerances.check(logits(model), base, tolerances.MERGE)
    model.merge_adapter(safe_merge=safe)
    model.unmerge_adapter()
    tolerances.check(logits(model), want, tolerances.MERGE)
    tolerances.check(logits(model.unload()), base, tolerances.MERGE)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_one_broken_layer_leaves_every_weight_as_it_was(call: str) -> None:
    model = patched()
    layers = [m for m in model.modules() if isinstance(m, LoRASBLinear)]
    before = [layer.base_weight().detach().clone() for layer in layers]
    with torch.no_grad():
        layers[-1].lorasb_R["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: .*not finite"):
        getattr(model, call)()
    assert all(torch.equal(layer.base_weight(), weight) for layer, weight in zip(layers, before, strict=True))
    assert not any(layer.merged for layer in layers)
    assert len([m for m in model.modules() if isinstance(m, LoRASBLinear)]) == len(layers)


def test_an_uninitialized_model_refuses_to_train() -> None:
    model = lorasb.patch(make("llama"), r=4).train()
    with pytest.raises(RuntimeError, match=r"lorasb\.initialize\(model, dataloader, lr="):
        model(**batches_for("llama")[0])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for kind in (None, False, True):
        model = patched(lora_dropout=0.25).train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            if kind:
                model.enable_input_require_grads()
        torch.manual_seed(5)
        model(**batches_for("llama")[0]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
        assert torch.equal(found[2][name], gradient), name


BAD_PATCHES = {
    "r too large": ({"r": 33}, ValueError, r"rank 33 is more than layer 'model\.layers\.0\.self_attn\.k_proj' allows: .*= 32"
                    r".*rank_pattern=\{'k_proj': 32\}"),
    "rank_pattern too large": ({"r": 4, "rank_pattern": {"v_proj": 40}}, ValueError, r"rank 40 is more than layer .*v_proj"),
    "r zero": ({"r": 0}, ValueError, "r must be a positive integer, got 0"),
    "r negative": ({"r": -3}, ValueError, "r must be a positive integer, got -3"),
    "r above the kernels' limit": ({"r": 257}, ValueError, "r must be at most 256, got 257"),
    "r float": ({"r": 8.0}, ValueError, r"r must be a positive integer, got 8\.0"),
    "rank_pattern zero": ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be a positive"),
    "no target": ({"target_modules": ["qq_proj"]}, ValueError, r"qq_proj.* not found in the base model"),
    "all excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ValueError, "No modules were targeted"),
    "unknown field": ({"rank": 8}, TypeError, "LoRASBConfig has no field 'rank': did you mean"),
    "unrelated field": ({"zzz": 8}, TypeError, "LoRASBConfig has no field 'zzz': known fields: .*target_modules"),
    "init": ({"init": "pissa"}, ValueError, "init must be one of update, lora-xs, kaiming, got 'pissa'"),
    "dropout": ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must lie in \[0, 1\), got 1\.0"),
    "scaling": ({"scaling": 0.0}, ValueError, "scaling must be finite and not zero"),
    "alpha": ({"lora_alpha": 16}, ValueError, "lora_alpha belongs to init='lora-xs'"),
    "pattern alone": ({"layers_pattern": "layers"}, ValueError, "give layers_to_transform too"),
    "layer zero with regex": ({"target_modules": ".*q_proj", "layers_to_transform": 0}, ValueError, "select the layers in the regex"),
    "scaling text": ({"scaling": "2"}, ValueError, "scaling must be finite and not zero"),
    "layers with regex": ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, ValueError, "select the layers in the regex"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, TypeError, "is a Embedding: expected nn.Linear"),
    "task type": ({"task_type": "CHESS"}, ValueError, "Invalid task type"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PATCHES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_failed_patch_says_why_and_leaves_the_model_as_it_was(name: str) -> None:
    fields, kind, message = BAD_PATCHES[name]
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
            assert {m.r["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {32, 64}
    again = lorasb.patch(lorasb.patch(make("llama"), config).unload(), config)
    assert adapted(again)
    assert adapted(peft.get_peft_model(make("gpt2"), config))


def test_get_peft_model_infers_what_patch_infers() -> None:
    model = peft.get_peft_model(make("roberta"), lorasb.LoRASBConfig(r=4, init="lora-xs"))
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {4.0}


@pytest.mark.parametrize("kind", ["DistilBert", "XLNet", "Llama"])
def test_fresh_heads_under_other_names(kind: str) -> None:
    configs = {
        "DistilBert": transformers.DistilBertConfig(
            num_labels=3, dim=32, hidden_dim=48, n_layers=1, n_heads=2, vocab_size=99
        ),
        "XLNet": transformers.XLNetConfig(num_labels=3, d_model=32, d_inner=48, n_layer=1, n_head=2, vocab_size=99),
        "Llama": transformers.LlamaConfig(num_labels=3, pad_token_id=0, num_key_value_heads=2, **SIZES),
    }
    model = lorasb.patch(getattr(transformers, f"{kind}ForSequenceClassification")(configs[kind]), r=4).eval()
    heads = {"classifier", "pre_classifier", "score", "logits_proj"}
    assert not any(set(name.split(".")) & heads for name in adapted(model))
    lorasb.initialize(model, batches_for("roberta"), lr=1e-3, progress=False)
    want = logits(model, "roberta")
    tolerances.check(logits(model.merge_and_unload(), "roberta"), want, tolerances.MERGE)


def test_models_that_read_no_text_get_no_text_task() -> None:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=99,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = lorasb.patch(transformers.WhisperForConditionalGeneration(config), r=4).eval()
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 99, (2, 5))}
    lorasb.initialize(model, [batch], lr=1e-3, progress=False)
    assert torch.isfinite(model(**batch).loss)


def test_layers_to_transform_with_all_linear() -> None:
    model = lorasb.patch(make("llama"), r=4, layers_to_transform=[1])
    assert len(adapted(model)) == 7
    assert all(name.startswith("model.layers.1.") for name in adapted(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match="shares its weight with the input embedding"):
        lorasb.patch(make("llama"), r=4, target_modules=["lm_head"])


def test_attention_that_reads_its_own_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert adapted(lorasb.patch(model, r=2)) == {"0"}
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"belongs to an nn\.MultiheadAttention"):
        lorasb.patch(model, r=2, target_modules=["out_proj"])


def test_offloaded_bases(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from accelerate import cpu_offload

    want = patched()
    model = make("llama")
    cpu_offload(model, execution_device="cpu")
    model = lorasb.patch(model, r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    tolerances.check(logits(model), logits(want), tolerances.MERGE)


def test_config_and_fields_together() -> None:
    with pytest.raises(TypeError, match="expected a config or fields, got both: put r into the config"):
        lorasb.patch(make("llama"), lorasb.LoRASBConfig(), r=4)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_double_patching() -> None:
    base = make("llama")
    model = lorasb.patch(base, r=4)
    names = adapted(model)
    with pytest.raises(ValueError, match=r"got a peft\.PeftModel.*model\.add_adapter"):
        lorasb.patch(model)
    with pytest.raises(ValueError, match=r"has an adapter 'default' already.*model\.unload\(\)"):
        lorasb.patch(base, r=4)
    assert adapted(model) == names


def test_a_failed_second_adapter_leaves_the_first() -> None:
    model = patched()
    want, names = logits(model), trained(model)
    with pytest.raises(ValueError, match="rank 40 is more than layer"):
        model.add_adapter("second", lorasb.LoRASBConfig(r=40))
    assert trained(model) == names
    assert torch.equal(logits(model), want)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_not_supported(dtype: torch.dtype) -> None:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"up_proj.* {dtype} weight.*lorasb.quantize quantized"):
        lorasb.patch(model, r=4)


PAPER = {
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
        ),
        "all-linear",
        {32: 229_376, 64: 917_504, 96: 2_064_384},
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
            head_dim=256, vocab_size=256_000,
        ),
        "all-linear",
        {32: 301_056, 64: 1_204_224, 96: 2_709_504},
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
            vocab_size=128_256,
        ),
        "all-linear",
        {32: 200_704, 64: 802_816, 96: 1_806_336},
    ),
    "roberta": (
        transformers.RobertaModel,
        transformers.RobertaConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50_265
        ),
        ["query", "key", "value", "attention.output.dense"],
        {8: 6_144, 16: 24_576, 24: 55_296},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_trained_parameters_are_the_papers(name: str) -> None:
    kind, config, targets, counts = PAPER[name]
    for r, count in counts.items():
        with torch.device("meta"):
            model = kind(config)
        model = lorasb.patch(model, r=r, target_modules=targets)
        cores = [p for n, p in model.named_parameters() if "lorasb_R" in n]
        assert sum(p.numel() for p in cores) == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(p.is_meta for p in model.parameters())


def test_before_initialization_the_equivalent_gradient_changes_nothing_either() -> None:
    want = logits(make("llama"))
    model = lorasb.patch(make("llama"), r=4, equivalent_gradient=True).eval()
    assert torch.equal(logits(model), want)
    found = model(**batches_for("llama", count=1)[0])  # evaluation that keeps the graph
    assert torch.equal(found.logits.detach(), want)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        found.loss.backward()
