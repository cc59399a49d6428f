"""An adapter that is saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from models import patched


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    patched().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy, which a test may damage."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))
