"""The card beside a saved adapter says what it is and where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import make, patched

import lorasb


@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-llama")
def test_the_model_card_states_where_the_adapter_comes_from(tmp_path: Path) -> None:
    model = patched()
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.peft_config["default"].init_provenance["data"] = "six sentences"
    for _ in range(2):  # saving again replaces the section
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    facts = model.peft_config["default"].init_provenance
    for value in (
        "tiny-llama",
        "six sentences",
        facts["data_sha256"],
        "| seed | 0 |",
        "| η of the simulated step | 0.02 |",
        "| init samples | 6 |",
        f"torch {torch.__version__}",
        f"lorasb {lorasb.__version__}",
    ):
        assert value in card
    assert card.count("# A LoRA-SB adapter") == 1
    assert card.startswith("---\n")
    assert "\n- lora-sb\n" in card.partition("\n---\n")[0]  # a tag, in the front matter


def test_the_card_of_a_baseline_says_so(tmp_path: Path) -> None:
    model = lorasb.patch(make("roberta"), r=4, init="lora-xs")
    lorasb.initialize(model, progress=False)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "LoRA-XS" in card
    assert "| scaling s | 4 |" in card
    assert "also trained, and saved whole | classifier" in card
    assert "More Information Needed" not in card
