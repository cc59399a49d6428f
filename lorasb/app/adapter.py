"""A run's adapter: added and initialized, or loaded from an earlier start; and `lorasb init`, which writes one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
from torch.utils.data import DataLoader, Dataset

import lorasb

from ..distributed.process_group import Processes
from ..init import InitReport, RankSuggestion
from ..init.sampling import Batch
from ..tuner.targets import missing_from_checkpoint
from ..utils import plotting
from ..utils.atomic_files import locked, replacing_folder, write_json
from .prepare import Run, prepare, save_adapter
from .reinforce import rewarded
from .settings import CONFIG_NAME, InitSettings, targets, write_config
from .terminal import console
from .tokenize import Rows

LORA_RANK = 32  # the rank that the paper compares with
REPORT_NAME = "report.json"


def adapt(run: Run) -> InitReport | None:
    """Add the adapter and initialize it; returns the report, None for plain LoRA."""
    if run.settings.method != "lora":
        return patch_and_initialize(run)
    r = run.settings.r or LORA_RANK
    # alpha = r gives PEFT's scaling alpha / r = 1, as s is for LoRA-SB by default
    heads = missing_from_checkpoint(run.model) or None  # PEFT knows those of some names only
    config = peft.LoraConfig(
        r=r, lora_alpha=r, task_type=run.problem.task_type, modules_to_save=heads, **_common_options(run)
    )
    run.model = peft.get_peft_model(run.model, config)
    return None


def _common_options(run: Run) -> dict[str, Any]:
    return {
        "target_modules": targets(run.settings.target_modules),
        "rank_pattern": run.settings.rank_pattern or {},
        "lora_dropout": run.settings.lora_dropout,
    }


def patch_and_initialize(run: Run, **options: Any) -> InitReport:
    """Add the adapter of LoRA-SB or LoRA-XS and initialize it; `options` go to `lorasb.initialize`."""
    settings = run.settings
    init = "lora-xs" if settings.method == "lora-xs" else "update"
    run.model = lorasb.patch(run.model, r=settings.r, init=init, init_seed=settings.seed, **_common_options(run))
    # `patch` has initialized LoRA-XS: the SVD of W needs no data
    report = run.model.base_model.init_reports["default"] if init == "lora-xs" else _initialize(run, options)
    run.model.peft_config["default"].init_provenance["data"] = run.data
    return report


def _initialize(run: Run, options: dict[str, Any]) -> InitReport:
    """Initialize LoRA-SB by the first step on the run's examples, or on rewards, and set the run's rate."""
    settings = run.settings
    loader = start_loader(run, run.train_ids)
    run.measured = settings.lr is None and settings.eta is None and settings.rl is None
    eta = settings.eta or lorasb.first_step_lr("auto" if run.measured else run.lr, run.warmup_steps)
    options |= {"num_samples": settings.samples, "update": settings.update, "seed": settings.seed}
    if settings.start != "limited":
        options["longest_start"] = None if settings.start == "paper" else 0.0
    if settings.rl is not None and settings.rl_start == "zero":
        options["longest_start"] = 0.0
    if settings.rl is not None and settings.rl_start == "rewards":
        loader, options["loss_fn"], options["num_samples"] = rewarded(run), lorasb.policy_loss, None
    report = lorasb.initialize(run.model, loader, lr=eta, **options)
    run.lr = report.rate or run.lr
    return report


def start_loader(run: Run, encoded: Rows) -> Iterable[Batch]:
    """A loader of this rank's share of examples, for the initialization."""
    # The shares are contiguous, and in rank order they are the whole list, so that the drawn samples are those of a
    # single process.
    rank, world_size = Processes().rank, Processes().world_size
    share = encoded[len(encoded) * rank // world_size : len(encoded) * (rank + 1) // world_size]
    collate = run.problem.collator(run.tokenizer, run.model)
    return DataLoader(cast(Dataset, share), batch_size=run.settings.batch_size, collate_fn=collate)


def load_adapter(run: Run, folder: Path) -> None:
    """Load a saved adapter into the run's base model, for training."""
    run.model = peft.PeftModel.from_pretrained(run.model, str(folder), is_trainable=True)


def load_report(folder: Path) -> InitReport | None:
    """The saved report of an initialization; None if there is none (plain LoRA)."""
    file = folder / REPORT_NAME
    return InitReport.load(file) if file.is_file() else None


RANKS_NAME = "ranks.json"
PLOTS = {"energy.png": "layers", "ranks.png": "ranks", "spectrum.png": "spectrum"}


def run_init(settings: InitSettings) -> tuple[InitReport, RankSuggestion | None]:
    """Initialize an adapter; write adapter/, report.json, plots, config.yaml and, with a target, ranks.json."""
    settings.check()
    if settings.energy is not None and settings.parameters is not None:
        raise ValueError("--energy and --parameters are two ways to choose ranks: give one of them")
    folder = Path(settings.output)
    with locked(folder):
        # Nothing is evaluated: one held-out example is the least that `prepare` takes.
        run = prepare(replace(settings, eval_examples=1))
        console.print(f"in {run.precision.name}: {run.precision.reason}", highlight=False)
        options = {name: getattr(settings, name) for name in ("strategy", "memory_budget", "cache", "stability")}
        report = patch_and_initialize(run, **options)
        suggestion = None
        if settings.energy is not None or settings.parameters is not None:
            suggestion = report.suggest_ranks(energy=settings.energy, parameters=settings.parameters)
        with replacing_folder(folder / "adapter") as target:
            save_adapter(run, target)
        report.save(folder / REPORT_NAME)
        if plotting.installed():
            for name, kind in PLOTS.items():
                report.plot(folder / name, kind)
        (folder / RANKS_NAME).unlink(missing_ok=True)  # of an earlier call
        if suggestion is not None:
            write_json(folder / RANKS_NAME, {"rank_pattern": suggestion.rank_pattern})
        write_config(folder / CONFIG_NAME, settings)
    return report, suggestion
