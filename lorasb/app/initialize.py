"""`lorasb init`: initializes an adapter from a model and data; writes it, its report, plots and suggested ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..init import InitReport, RankSuggestion
from ..utils import plotting
from ..utils.atomic_files import locked, replacing_folder, write_json
from .adapter import adapt, save_adapter
from .config_file import CONFIG_NAME, write_config
from .prepare import Run, prepare
from .settings import InitSettings, check_rules
from .terminal import console

RANKS_NAME = "ranks.json"
PLOTS = {"energy.png": "layers", "ranks.png": "ranks", "spectrum.png": "spectrum"}


def run_init(settings: InitSettings) -> tuple[InitReport, RankSuggestion | None]:
    """Initialize an adapter; write adapter/, report.json, plots, config.yaml and, with a target, ranks.json."""
    settings.run.check()
    _check_targets(settings)
    with locked(settings.run.output):
        return _run(settings)


def _run(settings: InitSettings) -> tuple[InitReport, RankSuggestion | None]:
    # Nothing is evaluated: one held-out example is the least that `prepare` takes.
    run = prepare(replace(settings.run, eval_examples=1))
    console.print(f"in {run.precision.name}: {run.precision.reason}", highlight=False)
    options = {name: getattr(settings, name) for name in ("strategy", "memory_budget", "cache", "stability")}
    report, _ = adapt(run, **options)
    suggestion = None
    if settings.energy is not None or settings.parameters is not None:
        suggestion = report.suggest_ranks(energy=settings.energy, parameters=settings.parameters)
    _save(run, report, suggestion, settings)
    return report, suggestion


def _check_targets(settings: InitSettings) -> None:
    """Raise a ValueError for bad settings before the model is loaded."""
    check_rules(settings)
    if settings.energy is not None and settings.parameters is not None:
        raise ValueError("--energy and --parameters are two ways to choose ranks: give one of them")
    if settings.energy is not None and not 0 < settings.energy <= 1:
        raise ValueError(f"--energy is a share in (0, 1], got {settings.energy!r}")


def _save(run: Run, report: Any, suggestion: RankSuggestion | None, settings: InitSettings) -> None:
    folder = Path(run.settings.output)
    with replacing_folder(folder / "adapter") as target:
        save_adapter(run, target)
    report.save(folder / "report.json")
    if plotting.installed():
        for name, kind in PLOTS.items():
            report.plot(folder / name, kind)
    (folder / RANKS_NAME).unlink(missing_ok=True)  # of an earlier call
    if suggestion is not None:
        write_json(folder / RANKS_NAME, {"rank_pattern": suggestion.rank_pattern})
    write_config(folder / CONFIG_NAME, settings.run, settings)
