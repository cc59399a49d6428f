"""Experts as vLLM loads them: its published rules expand `experts` to a linear an expert and projection."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from adapters import layers
from families import EXPERTS
from models import make, patched
from safetensors.torch import load_file
from tolerances import EXPORT, check

import lorasb

# vllm/lora/utils.py, process_packed_modules_mapping: packed_modules_mapping["experts"] is the list of checkpoint names
# of every expert and projection, `experts.{e}.{name}`; the names are the models' own (mixtral.py, qwen3_moe.py).
RULES = {
    "mixtral": (r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w1|w3|w2)", ("w1", "w3", "w2")),
    "qwen3_moe": (
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_every_name_is_one_that_vllm_expands_and_every_delta_is_the_experts(kind: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "init": "kaiming", "scaling": 0.5}
    model = lorasb.patch(make(kind), r=3, **options).eval()
    lorasb.export_lora(model, tmp_path, format="vllm", quiet=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rule, (gate, up, down) = RULES[kind]
    adapted, found = layers(model), set()
    for key in [key for key in tensors if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] == 8  # the smallest that vLLM takes above 3
        match = re.fullmatch(rule, name)
        if match is None:
            want = adapted[name].get_delta_weight("default")
        else:
            layer, expert, projection = match.groups()
            found.add((layer, expert, projection))
            ours = "down_proj" if projection == down else "gate_up_proj"
            want = adapted[f"model.layers.{layer}.mlp.experts.{ours}.{expert}"].get_delta_weight("default")
            if projection != down:
                want = want.chunk(2)[0 if projection == gate else 1]
        check(b @ a, want, EXPORT)
    assert found == {(str(i), str(e), name) for i in range(2) for e in range(4) for name in (gate, up, down)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("target_parameters")) == (8, 8, None)
    assert set(config["target_modules"]) == {"q_proj", gate, up, down}


def test_a_dense_model_has_the_usual_names_at_a_rank_of_vllms(tmp_path: Path) -> None:
    model = patched("llama", r=4)
    lorasb.export_lora(model, tmp_path / "a", format="vllm", quiet=True)
    lorasb.export_lora(model, tmp_path / "b", quiet=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert {len(value) for key, value in one.items() if "lora_A" in key} == {8}
