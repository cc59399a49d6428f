"""A run's adapter: added and initialized, or loaded from an earlier start; and `lorasb init`, which writes one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch.utils.data import DataLoader

import lorasb

from ..distributed.process_group import Processes
from ..init import InitReport, RankSuggestion
from ..init.sampling import Batch
from ..utils import plotting
from ..utils.atomic_files import locked, replacing_folder, write_json
from .config_file import CONFIG_NAME, write_config
from .data import describe_data
from .evaluation import token_limit
from .prepare import Run, prepare, save_adapter
from .reinforce import Prompt, judge_of, prompt_of
from .settings import InitSettings, check_rules, target_names
from .terminal import console

REWARD_SAMPLES = 32  # prompts of a start on rewards
LORA_RANK = 32  # the rank that the paper compares with
REPORT_NAME = "report.json"


def adapt(run: Run) -> InitReport | None:
    """Add the adapter and initialize it; returns the report, None for plain LoRA."""
    if run.settings.method != "lora":
        return patch_and_initialize(run)
    r = run.settings.r or LORA_RANK
    # alpha = r gives PEFT's scaling alpha / r = 1, as s is for LoRA-SB by default
    heads = run.problem.heads(run.model) or None  # PEFT knows those of some names only
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
    run.model.peft_config["default"].init_provenance["data"] = describe_data(settings, len(run.train_ids))
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
        loader, options["loss_fn"], options["num_samples"] = _rewarded(run), lorasb.policy_loss, None
    report = lorasb.initialize(run.model, loader, lr=eta, **options)
    run.lr = report.rate or run.lr
    return report


def start_loader(run: Run, encoded: list[Any]) -> Iterable[Batch]:
    """A loader of this rank's share of examples, for the initialization."""
    # The shares are contiguous, and in rank order they are the whole list, so that the drawn samples are those of a
    # single process.
    rank, world_size = Processes().rank, Processes().world_size
    share = encoded[len(encoded) * rank // world_size : len(encoded) * (rank + 1) // world_size]
    collate = run.problem.collator(run.tokenizer, run.model.get_base_model())
    loader: DataLoader[Any] = DataLoader(cast(Any, share), batch_size=run.settings.batch_size, collate_fn=collate)
    return loader


def _rewarded(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """Completions of some prompts, sampled and scored, as many as the initialization takes samples."""
    settings, judge = run.settings, judge_of(run.settings)
    examples = {json.dumps(prompt_of(run, example)): example for example in run.train}  # each prompt once

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return judge(completions, [examples[json.dumps(prompt)] for prompt in prompts])

    batches = lorasb.reward_batches(
        run.model,
        run.tokenizer,
        [json.loads(prompt) for prompt in list(examples)[: settings.samples or REWARD_SAMPLES]],
        reward,
        generations=settings.generations,
        max_new_tokens=token_limit(run.train_ids, settings.max_new_tokens),
        temperature=settings.temperature,
        seed=settings.seed,
    )
    return iter(batches)


def targets(value: str | None) -> str | list[str]:
    """`--target-modules` as PEFT's target_modules: "all-linear", a list of names, or a regular expression."""
    if value is None or value == "all-linear":
        return "all-linear"
    return target_names(value) or value


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
    settings.run.check()
    check_rules(settings)
    if settings.energy is not None and settings.parameters is not None:
        raise ValueError("--energy and --parameters are two ways to choose ranks: give one of them")
    folder = Path(settings.run.output)
    with locked(folder):
        # Nothing is evaluated: one held-out example is the least that `prepare` takes.
        run = prepare(replace(settings.run, eval_examples=1))
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
        write_config(folder / CONFIG_NAME, settings.run, settings)
    return report, suggestion
