"""Tiny models of real families, batches for them, and a poison for memory that nobody wrote."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is defined: they run on the CPU
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorasb

transformers.utils.logging.disable_progress_bar()

Batch = dict[str, Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def llama(**extra: object) -> nn.Module:
    config = transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True, **SIZES, **extra)
    return transformers.LlamaForCausalLM(config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=16, sliding_window=8, pad_token_id=0, **SIZES)
    return transformers.Gemma2ForCausalLM(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(max_position_embeddings=64, num_labels=3, pad_token_id=1, **SIZES)
    return transformers.RobertaForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def mistral() -> nn.Module:
    config = transformers.MistralConfig(num_key_value_heads=2, sliding_window=8, pad_token_id=0, **SIZES)
    return transformers.MistralForCausalLM(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, pad_token_id=0, **SIZES)
    return transformers.Qwen3ForCausalLM(config)


def phi3() -> nn.Module:
    config = transformers.Phi3Config(num_key_value_heads=2, pad_token_id=0, **SIZES)
    return transformers.Phi3ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gemma2": gemma2,
    "roberta": roberta,
    "gpt2": gpt2,
    "mistral": mistral,
    "qwen3": qwen3,
    "phi3": phi3,
    "t5": t5,
}


def text(rows: int, tokens: int, seed: int) -> Batch:
    """Causal batch without padding; every second label of the first half is ignored."""
    ids = torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : tokens // 2 : 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def classes(rows: int, tokens: int, seed: int) -> Batch:
    """Classification batch."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (rows, tokens), generator=g)
    labels = torch.randint(0, 3, (rows,), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[family]().to(dtype).eval()


def batches_for(family: str, count: int = 3, rows: int = 2, tokens: int = 12) -> list[Batch]:
    """Batches that fit a family."""
    return [(classes if family == "roberta" else text)(rows, tokens, seed) for seed in range(count)]


def patched(family: str = "llama", r: int = 4, dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    """A tiny model with an initialised adapter whose effect is plain to see."""
    model = lorasb.patch(make(family, dtype=dtype), r=r, **fields)
    lorasb.initialize(model, batches_for(family), lr=2e-2, progress=False)
    return model


def logits(model: nn.Module, family: str = "llama") -> Tensor:
    """The model's answer to a fixed batch."""
    batch = batches_for(family, count=1)[0]
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN, so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
