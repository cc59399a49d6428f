"""Results that cannot be written: what was trained is kept."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import assert_same
from transformers import Trainer

from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings
from lorasb.utils import plotting


def test_results_that_cannot_be_written_leave_the_former_ones(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    before = {path.name: path.read_bytes() for path in (output / "lora").iterdir()}

    def full(*given: Any, **named: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lorasb.export.lora.export_lora", full)
    with pytest.raises(OSError, match="no space left"):
        run_finetune(replace(base, output=str(output), seed=1, resume="never"))
    former = output / "former"
    assert {path.name: path.read_bytes() for path in (former / "lora").iterdir()} == before
    assert (former / "energy.png").is_file()


def test_without_matplotlib_a_run_has_no_pictures(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plotting, "installed", lambda: False)
    run_finetune(replace(base, output=str(tmp_path)))
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".json", ".yaml"}
    assert "no pictures, as matplotlib is not installed" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_at_the_results_loses_no_training(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    from lorasb.app import results

    def full(*given: Any, **named: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lorasb.export.lora.export_lora", full)
        with pytest.raises(OSError, match=r"lora cannot be written: .*No space left"):
            run_finetune(replace(base, output=str(tmp_path)))
    monkeypatch.setattr(Trainer, "train", lambda *given, **named: pytest.fail("nothing is trained twice"))
    run_finetune(replace(base, output=str(tmp_path)))
    assert_same(tmp_path, whole)
    assert results.load(tmp_path).summary["train_losses"]
