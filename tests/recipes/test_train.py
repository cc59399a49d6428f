"""What is checked of a run's training before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasb.recipes import finetune, train
from lorasb.recipes.finetune import run_finetune
from lorasb.recipes.settings import Settings


def test_a_report_to_a_missing_package_is_refused_before_any_work(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetune, "load_examples", lambda *given: pytest.fail("it is noticed before any work"))
    for name in ("wandb", "tensorboard"):
        with pytest.raises(
            ImportError, match=f"--report-to {name} needs a package that is not installed: pip install {name}"
        ):
            run_finetune(replace(base, report_to=name, output=str(tmp_path)))
