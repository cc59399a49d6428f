"""The card beside a saved adapter says what it is and where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from models import make, patched

import lorasb
from lorasb.checkpoints.model_card import ORIGIN_NAME, add_usage, update_card
from lorasb.utils.atomic_files import write_json


@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-llama")
def test_the_card_says_where_the_adapter_comes_from_and_how_to_use_it(tmp_path: Path) -> None:
    model = patched()
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.peft_config["default"].init_provenance["data"] = "six sentences"
    for _ in range(2):  # saving again replaces the section
        model.save_pretrained(tmp_path)
    add_usage(tmp_path, "```\nlorasb ask here\n```")
    card = (tmp_path / "README.md").read_text()
    facts = model.peft_config["default"].init_provenance
    said = ("tiny-llama", "six sentences", "| seed | 0 |", "| η of the simulated step | 0.02 |", "| init samples | 6 |")
    for value in (*said, facts["data_sha256"], f"torch {torch.__version__}", f"lorasb {lorasb.__version__}"):
        assert value in card
    assert card.count("# A LoRA-SB adapter") == 1
    assert card.startswith("---\n")
    assert "\n- lora-sb\n" in card.partition("\n---\n")[0]  # a tag, in the front matter
    section = card.partition("<!-- lorasb: start -->")[2].partition("<!-- lorasb: end -->")[0]
    assert section.strip().splitlines()[2].startswith("**`import lorasb` first**")
    assert "lorasb ask here" in section


def test_the_card_of_a_baseline_says_so(tmp_path: Path) -> None:
    lorasb.patch(make("roberta"), r=4, init="lora-xs").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "LoRA-XS" in card
    assert "| scaling s | 4 |" in card
    assert "also trained, and saved whole | classifier" in card
    assert "More Information Needed" not in card


BROKEN = ["---\n: [\n---\n# mine\n", "---\ntags: 3\n---\n# mine\n", "---\nnever closed\n# mine\n", "# mine\n", ""]
ODD = ["---\nlicense: mit\n---", "\n---\nlicense: mit\n---\n# mine", "--- \nlicense: mit\n---\t\n# mine"]


@pytest.mark.parametrize("card", BROKEN + ODD)
def test_a_card_with_broken_or_odd_front_matter_is_repaired_and_keeps_its_text(tmp_path: Path, card: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(card)
    for _ in range(2):
        update_card(tmp_path, {"r": 4}, 1.0)
    text = file.read_text()
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert "lora-sb" in front["tags"]
    assert front.get("license") == ("mit" if card in ODD else None)
    assert text.count("license") == (card in ODD)
    assert text.count("# A LoRA-SB adapter") == 1
    assert ("# mine" in text) == ("# mine" in card)


def test_the_card_names_the_hub_s_model_and_not_the_folder_of_its_conversion(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    base.mkdir()
    write_json(base / ORIGIN_NAME, {"hub_id": "them/model", "converted_from": "model.Q4_1.gguf"})
    model = patched()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(base) not in text
    assert "| base model | them/model, dequantized from model.Q4_1.gguf |" in text
