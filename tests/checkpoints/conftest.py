"""An adapter that is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import patched


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    patched().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
