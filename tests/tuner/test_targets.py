"""Which layers are adapted, at which rank, and for which task: names, patterns, caps, counts; modules in several places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import adapted, layers
from models import SIZES, make
from torch import nn

import lorasb


def test_the_default_rank_is_64_and_is_capped_and_saved() -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = lorasb.patch(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)))
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in layers(model).items()}
    assert ranks["q_proj"] == ranks["up_proj"] == 64
    assert ranks["k_proj"] == ranks["v_proj"] == 32
    saved = model.peft_config["default"]
    assert saved.r == 64
    assert set(saved.rank_pattern.values()) == {32}


TARGETS = {
    "list": ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}, {0, 1}),
    "regex": ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"mlp.up_proj", "mlp.down_proj"}, {1}),
    "exclude": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"self_attn.q_proj"}, {0, 1}),
    "exclude regex": ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"self_attn.q_proj"}, {1}),
    "layers": ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, {"self_attn.o_proj"}, {1}),
    "layer": (
        {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"self_attn.o_proj"},
        {0},
    ),
    "all of a layer": (
        {"layers_to_transform": [1]},
        {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
        {1},
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_names_patterns_and_layers_choose_what_is_adapted(name: str) -> None:
    fields, kinds, blocks = TARGETS[name]
    assert adapted(lorasb.patch(make("llama"), r=4, **fields)) == {
        f"model.layers.{i}.{k}" for i in blocks for k in kinds
    }


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


NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
ATTENTION = ["query", "key", "value", "attention.output.dense"]  # the paper's layers of RoBERTa
LLAMA, MISTRAL = (3072, 8192, 28, 24, 8, 128_256), (4096, 14336, 32, 32, 8, 32_000)
GEMMA, ROBERTA = (3584, 14336, 42, 16, 8, 256_000), (1024, 4096, 24, 16, 16, 50_265)
PAPER: dict[str, tuple[tuple[int, ...], dict[str, int], object, dict[int, int]]] = {
    "MistralForCausalLM": (MISTRAL, {}, "all-linear", {32: 229_376, 64: 917_504, 96: 2_064_384}),
    "Gemma2ForCausalLM": (GEMMA, {"head_dim": 256}, "all-linear", {32: 301_056, 64: 1_204_224, 96: 2_709_504}),
    "LlamaForCausalLM": (LLAMA, {}, "all-linear", {32: 200_704, 64: 802_816, 96: 1_806_336}),
    "RobertaModel": (ROBERTA, {}, ATTENTION, {8: 6_144, 16: 24_576, 24: 55_296}),
}


@pytest.mark.parametrize("kind", PAPER)
def test_trained_parameters_are_the_papers(kind: str) -> None:
    sizes, more, targets, counts = PAPER[kind]
    with torch.device("meta"):
        config = getattr(transformers, kind).config_class(**dict(zip(NAMES, sizes, strict=True)), **more)
        base = getattr(transformers, kind)(config)
    for r, count in counts.items():
        model = lorasb.patch(base, r=r, target_modules=targets)
        cores = [p for n, p in model.named_parameters() if "lorasb_R" in n]
        assert sum(p.numel() for p in cores) == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(p.is_meta for p in model.parameters())
        base = model.unload()


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gemma2", "CAUSAL_LM"), ("roberta", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]
)
def test_task_type_is_inferred(family: str, task: str) -> None:
    assert lorasb.patch(make(family), r=4).peft_config["default"].task_type == task


def test_get_peft_model_infers_what_patch_infers() -> None:
    model = peft.get_peft_model(make("roberta"), lorasb.LoRASBConfig(r=4, init="lora-xs"))
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert {layer.scaling["default"] for layer in layers(model).values()} == {4.0}


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


class Chain(nn.Module):
    """Linears one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))


def walks(depth: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often patching and unloading start to go through all modules of a model of `depth` targets."""
    net, count, original = Chain(depth), 0, nn.Module.named_modules

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        nonlocal count
        count += module is net
        return original(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", counted)
        model = lorasb.patch(net, r=2, target_modules=r"blocks\.\d+", init="random")
        patched = count
        model.unload()
    assert all(type(block) is nn.Linear for block in net.blocks)
    return [patched, count - patched]


def test_the_walks_over_a_model_do_not_grow_with_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of experts have thousands of targets."""
    few = walks(3, monkeypatch)
    assert min(few) > 0
    assert walks(30, monkeypatch) == few
