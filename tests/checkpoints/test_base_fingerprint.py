"""An adapter on another base than its own is refused, unless that is meant."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tolerances
import torch
import transformers
from adapters import layers
from models import logits, make, patched

import lorasb


def test_the_adapter_of_another_base_is_refused_unless_it_is_meant(saved: Path) -> None:
    base = make("llama", seed=1)
    answer = logits(base)
    message = r"this base is another one: 16 of 16 sampled weights of .*folder, check_base=False\)"
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(base), answer)
    assert not layers(base)
    with pytest.raises(ValueError, match="this base is another one"):
        make("llama", seed=1).load_adapter(str(saved))
    for number, config in enumerate((None, lorasb.LoRASBConfig.from_pretrained(str(saved), check_base=False))):
        base, again = make("llama", seed=1), saved.parent / f"again-{number}"
        options = {"check_base": False} if config is None else {"config": config}
        meant = peft.PeftModel.from_pretrained(base, saved, **options)
        meant.save_pretrained(again)
        want = logits(meant)
        values = json.loads((again / "adapter_config.json").read_text())
        assert values["base_fingerprint"] is None
        assert not {"check_base", "init_seed"} & set(values)
        tolerances.check(logits(peft.PeftModel.from_pretrained(make("llama", seed=1), again)), want, tolerances.EXACT)


def test_an_adapter_saved_without_a_fingerprint_loads_on_any_base(tmp_path: Path) -> None:
    patched("llama", check_base=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] is None
    peft.PeftModel.from_pretrained(make("llama", seed=1), tmp_path)


@pytest.mark.filterwarnings("ignore:Already found")
def test_a_base_of_another_size_is_refused(saved: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=99)
    with pytest.raises(ValueError, match="this base is another one"):
        peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), saved)


def test_the_same_base_in_another_precision_is_the_same_base(saved: Path) -> None:
    peft.PeftModel.from_pretrained(make("llama", dtype=torch.bfloat16), saved)
