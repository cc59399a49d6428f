"""Which layers `--target-modules` names, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from lorasb.recipes import adapter


class Reversed(set[str]):
    """A set in an order that `set` may have in another process."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__(), reverse=True))


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*layers\.[01]\..*proj", r".*layers\.[01]\..*proj"),
    ],
)
def test_a_list_a_pattern_or_all_linear_layers(said: str | None, want: Any) -> None:
    assert adapter.targets(said) == want


def test_an_adapter_is_the_same_bytes_whatever_the_order_of_its_sets(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("up", "down", "gate")})
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up", "down", "gate"]))
    config = adapted.peft_config["default"]
    config.target_modules = Reversed(config.target_modules)
    adapter.save_adapter(SimpleNamespace(model=adapted), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down", "gate", "up"]
    again: Any = peft.PeftModel.from_pretrained(
        torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in model}), tmp_path
    )
    assert set(again.peft_config["default"].target_modules) == {"up", "down", "gate"}
