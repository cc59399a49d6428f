"""What people do with a finished adapter: swap it in a running model, push it, merge it into a folder of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tolerances
import torch
import transformers
from models import batches_for, logits, make, patched
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import lorasb


def second(family: str = "llama") -> torch.nn.Module:
    model = lorasb.patch(make(family), r=4)
    lorasb.initialize(model, batches_for(family)[1:], lr=5e-2, progress=False)
    return model


def test_an_export_is_swapped_into_a_running_model(tmp_path: Path) -> None:
    first, other = patched(), second()
    for name, model in (("first", first), ("second", other)):
        lorasb.export_lora(model, tmp_path / name, quiet=True)
    running = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(running, target_rank=4)
    tolerances.check(logits(running), logits(first), tolerances.EXPORT)
    hotswap_adapter(running, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    tolerances.check(logits(running), logits(other), tolerances.EXPORT)
    assert (logits(first) - logits(other)).abs().max() > 1e-3


class Hub:
    """Keeps what would be sent to the Hub."""

    def __init__(self) -> None:
        self.sent: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
        self.sent[repo_id] = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
        return SimpleNamespace(commit_url="")


def test_push_to_hub_sends_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    model = patched()
    model.push_to_hub("somebody/adapter")
    files = hub.sent["somebody/adapter"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    tolerances.check(logits(again), logits(model), tolerances.EXACT)


def test_a_merged_model_is_a_plain_safetensors_folder(tmp_path: Path) -> None:
    model = patched()
    want = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tolerances.check(logits(again), want, tolerances.MERGE)
