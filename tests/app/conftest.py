"""Settings of a tiny run, the folder of an uninterrupted run, and those of interrupted ones."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import assert_same, stop_after, summary

from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Write empty files instead of plots: plotting takes a third of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())
        yield


@pytest.fixture(scope="session")
def base(tiny: Path, data: Path) -> Settings:
    sizes: dict[str, Any] = {"r": 8, "epochs": 2.0, "batch_size": 4, "samples": 8, "lr": 5e-3, "save_steps": "3"}
    return Settings(model=str(tiny), data=str(data), dtype="float32", **sizes)


@pytest.fixture(scope="session")
def whole(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run_finetune(replace(base, output=str(folder)))
    return folder


@pytest.fixture
def check_resume(tmp_path: Path) -> Callable[[Settings, int], dict[str, Any]]:
    """Check that a run interrupted after a step and resumed gives the same bits; return its summary."""

    def check(settings: Settings, step: int) -> dict[str, Any]:
        run_finetune(replace(settings, output=str(tmp_path / "a")))
        stop_after(step, settings, tmp_path / "b")
        run_finetune(replace(settings, output=str(tmp_path / "b")))
        assert_same(tmp_path / "a", tmp_path / "b")
        return summary(tmp_path / "a")

    return check


@pytest.fixture(scope="session")
def stopped(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted after step 7."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(7, base, folder)
    return folder


@pytest.fixture
def own(base: Settings, tmp_path: Path) -> Settings:
    """Settings of a run in the test's own folder."""
    return replace(base, output=str(tmp_path))


@pytest.fixture
def cut(own: Settings, stopped: Path) -> Settings:
    """Settings of a run in the test's own folder, interrupted after step 7."""
    shutil.copytree(stopped, own.output, dirs_exist_ok=True)
    return own


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return what was printed since the last call, on one line."""
    return lambda: " ".join("".join(capsys.readouterr()).split())
