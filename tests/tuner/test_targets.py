"""Which layers are adapted, and at which rank: names, patterns, layers, caps, and the paper's counts."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import adapted
from models import make
from torch import nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


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
}


@pytest.mark.parametrize("name", TARGETS)
def test_names_patterns_and_layers_choose_what_is_adapted(name: str) -> None:
    fields, kinds, layers = TARGETS[name]
    assert adapted(lorasb.patch(make("llama"), r=4, **fields)) == {
        f"model.layers.{i}.{k}" for i in layers for k in kinds
    }


def test_rank_pattern_sets_ranks_by_name_and_regex() -> None:
    model = lorasb.patch(make("llama"), r=4, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7})
    ranks = {n: m.r["default"] for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}
    for name, rank in ranks.items():
        expected = 2 if name.endswith("k_proj") else 7 if name.endswith("1.mlp.up_proj") else 4
        assert rank == expected


def test_layers_to_transform_keeps_all_linear_to_those_layers() -> None:
    model = lorasb.patch(make("llama"), r=4, layers_to_transform=[1])
    assert len(adapted(model)) == 7
    assert all(name.startswith("model.layers.1.") for name in adapted(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match="shares its weight with the input embedding"):
        lorasb.patch(make("llama"), r=4, target_modules=["lm_head"])


def test_attention_that_reads_its_own_weights_is_left_alone_or_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert adapted(lorasb.patch(model, r=2)) == {"0"}
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"belongs to an nn\.MultiheadAttention"):
        lorasb.patch(model, r=2, target_modules=["out_proj"])


PAPER = {
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        "all-linear",
        {32: 229_376, 64: 917_504, 96: 2_064_384},
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            vocab_size=256_000,
        ),
        "all-linear",
        {32: 301_056, 64: 1_204_224, 96: 2_709_504},
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
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
}


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
