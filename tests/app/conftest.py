"""The settings of a tiny run, and the folder of one that nobody disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


@pytest.fixture(scope="session")
def base(tiny: Path, data: Path) -> Settings:
    return Settings(
        model=str(tiny),
        data=str(data),
        r=8,
        epochs=2.0,
        batch_size=4,
        samples=8,
        dtype="float32",
        lr=5e-3,
        save_steps="3",
    )


@pytest.fixture(scope="session")
def whole(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_finetune(replace(base, output=str(folder)))
    return folder
