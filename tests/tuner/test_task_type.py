"""The task that an adapter is for, by the model's class."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from models import make

import lorasb
from lorasb.layers.linear import LoRASBLinear


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gemma2", "CAUSAL_LM"), ("roberta", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]
)
def test_task_type_is_inferred(family: str, task: str) -> None:
    assert lorasb.patch(make(family), r=4).peft_config["default"].task_type == task


def test_get_peft_model_infers_what_patch_infers() -> None:
    model = peft.get_peft_model(make("roberta"), lorasb.LoRASBConfig(r=4, init="lora-xs"))
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {4.0}


def test_models_that_read_no_text_get_no_text_task() -> None:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=99,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = lorasb.patch(transformers.WhisperForConditionalGeneration(config), r=4).eval()
    batch = {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 99, (2, 5))}
    lorasb.initialize(model, [batch], lr=1e-3, progress=False)
    assert torch.isfinite(model(**batch).loss)
