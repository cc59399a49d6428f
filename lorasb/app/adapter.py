"""Add and initialize or load a run's adapter, run `lorasb init`, and make and load bases.

A basis is a pair of A and B that adapters share. `lorasb basis` makes one from the first steps of tasks, and measures
how well data fits it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch.utils.data import DataLoader, Dataset

import lorasb

from .. import constants
from ..checkpoints import shared_factors
from ..checkpoints.adapter_file import difference, fingerprint, read_config
from ..distributed.process_group import Processes
from ..init import BasisFit, InitReport, RankSuggestion, TasksReport
from ..init.pipeline import rate_of_initialized
from ..init.sampling import Batch
from ..init.task import InitOptions
from ..layers.lookup import adapted_layers
from ..serving import joint_basis
from ..serving.basis import check_names
from ..tuner.targets import missing_from_checkpoint
from ..utils import plotting
from ..utils.atomic_files import LOCK, locked, refuse_unwritable, replacing_folder, write_json
from ..utils.precision import resolve
from ..utils.reading import read_json
from .data import Example, load_examples
from .evaluation import LanguageModeling
from .prepare import Run, device, load_model, prepare, save_adapter
from .reinforce import rewarded
from .run_folder import RUN_NAME, SUMMARY_NAME
from .settings import CONFIG_NAME, InitSettings, Settings, targets, write_config
from .terminal import console
from .tokenize import Rows

LORA_RANK = 32  # the rank that the paper compares with
REPORT_NAME = "report.json"


def check_adapter(run: Run) -> None:
    """Raise if the model cannot have the run's adapters; a new one is tried on the meta device."""
    check_names(run.model, run.adapters)
    if run.settings.basis is not None:
        refuse_labels(run.train, run.settings.data or "")
        refuse_other_base(run)
    elif run.settings.method != "lora":
        with torch.device("meta"):
            empty = type(run.model)(copy.deepcopy(run.model.config))
        lorasb.patch(empty, r=run.settings.r, **_common_options(run))


def refuse_labels(examples: Iterable[Example], file: str) -> None:
    """Raise a ValueError for labeled rows: they need a classification head, which a basis lacks."""
    if any(example.label is not None for example in examples):
        raise ValueError(f"{file}: expected rows of prompt and completion, got labeled ones: a basis has no head")


def refuse_other_base(run: Run) -> None:
    """Raise a ValueError if the base model is not the basis's: compare weights or, if unreadable, names."""
    settings, folder = run.settings, Path(run.settings.basis or "")
    made_on, expected = read_card(folder).model, read_config(folder).get("base_fingerprint") or {}
    modules = dict(run.model.named_modules())
    found = {name: getattr(modules.get(name), "weight", None) for name in expected}
    weights = {name: weight for name, weight in found.items() if weight is not None}
    reason = difference(weights, {name: expected[name] for name in weights})
    if reason is None and absolute(made_on) != absolute(settings.model) and fingerprint(weights) is None:
        reason = "its weights cannot be compared, only its name"  # quantized ones
    if reason is not None:
        wrong = (
            f"was made on {made_on}, got --model {settings.model}, which is another model ({reason}): "
            "pass the model that the basis was made on"
        )
        if absolute(made_on) == absolute(settings.model):
            wrong = f"was made on {made_on}, whose weights have changed ({reason}): make the basis again"
        raise ValueError(f"--basis {settings.basis} {wrong}")


def adapt(run: Run) -> InitReport | None:
    """Add and initialize the adapter; return the report, None for plain LoRA."""
    if run.settings.method != "lora":
        return patch_and_initialize(run)
    r = run.settings.r or LORA_RANK
    # alpha = r makes PEFT's scaling alpha / r = 1, like LoRA-SB's default s
    heads = missing_from_checkpoint(run.model) or None  # PEFT recognizes heads by a few names only
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
    """Initialize LoRA-SB from the first step on the run's examples or on rewards, and set the run's rate."""
    settings = run.settings
    loader = start_loader(run, run.train_ids)
    eta = settings.eta or lorasb.first_step_lr("auto" if run.measures_rate else run.lr, run.warmup_steps)
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
    """Return a loader of this rank's share of the examples, for the initialization."""
    # The shares are contiguous and in rank order, so that the samples drawn are the same as in a single process.
    rank, world_size = Processes().rank, Processes().world_size
    share = encoded[len(encoded) * rank // world_size : len(encoded) * (rank + 1) // world_size]
    collate = run.problem.collator(run.tokenizer, run.model)
    return DataLoader(cast(Dataset, share), batch_size=run.settings.usual_batch, collate_fn=collate)


def load_adapter(run: Run, folder: Path) -> None:
    """Load a saved adapter into the run's base model, for training."""
    run.model = peft.PeftModel.from_pretrained(run.model, str(folder), is_trainable=True)


def load_report(folder: Path) -> InitReport | None:
    """Load the saved report of an initialization; None if there is none (plain LoRA)."""
    file = folder / REPORT_NAME
    return InitReport.load(file) if file.is_file() else None


RANKS_NAME = "ranks.json"
PLOTS = {"energy.png": "layers", "ranks.png": "ranks", "spectrum.png": "spectrum"}


def run_init(settings: InitSettings) -> tuple[InitReport, RankSuggestion | None]:
    """Initialize an adapter; write adapter/, report.json, plots, config.yaml and, if it suggests ranks, ranks.json."""
    settings.check()
    if settings.energy is not None and settings.parameters is not None:
        raise ValueError("--energy and --parameters are two ways to choose ranks: give one of them")
    folder = Path(settings.output)
    if (folder / SUMMARY_NAME).exists() or (folder / "checkpoints" / RUN_NAME).exists():
        raise ValueError(
            f"--output {folder} has a run of lorasb finetune, whose adapter this would replace: take another"
        )
    if (folder / "adapter").exists() and not (folder / REPORT_NAME).exists():
        raise ValueError(f"--output {folder} has a folder adapter that lorasb init did not write: take another")
    with locked(folder):
        refuse_unwritable(folder)  # before the work, not after it
        run = prepare(replace(settings, eval_examples=0))
        console.print(f"in {run.precision.name}: {run.precision.reason}", highlight=False)
        options = {name: getattr(settings, name) for name in ("strategy", "memory_budget", "cache", "stability")}
        report = patch_and_initialize(run, **options)
        suggestion = None
        if settings.energy is not None or settings.parameters is not None:
            suggestion = report.suggest_ranks(energy=settings.energy, parameters=settings.parameters)
        with replacing_folder(folder / "adapter") as target:
            save_adapter(run, target)
            report.save(folder / REPORT_NAME)  # in the block: without a report, the next call would refuse the adapter
        if plotting.installed():
            for name, kind in PLOTS.items():
                report.plot(folder / name, kind)
        (folder / RANKS_NAME).unlink(missing_ok=True)  # left by an earlier call
        if suggestion is not None:
            write_json(folder / RANKS_NAME, {"rank_pattern": suggestion.rank_pattern})
        write_config(folder / CONFIG_NAME, settings)
    return report, suggestion


CARD_NAME = "basis.json"
BASIS_RATE = 1e-3  # η of the tasks' first steps; a basis does not depend on their length


Tasks = dict[str, dict[str, float]]  # task -> number of examples, and the share of its first step that the basis keeps


@dataclass(frozen=True)
class BasisCard:
    """Description of a basis, saved in its folder as basis.json."""

    model: str  # absolute folder or hub id
    digest: str  # SHA-256 of A and B, recorded in every adapter on the basis
    r: int
    update: str
    tasks: Tasks
    dtype: str = "auto"  # of A and B; adapters on the basis compute in it

    @property
    def of_loras(self) -> bool:
        """True for a basis made from LoRAs: the share of a first step that it keeps predicts nothing."""
        return all("examples" not in found for found in self.tasks.values())


def make_basis(settings: Settings, data: Sequence[str], loras: Sequence[str] = ()) -> BasisCard:
    """Make a basis from the first steps of tasks, or from trained LoRAs, and write it into `settings.output`.

    Args:
        settings: as for a run; without `r`, the rank is the LoRAs' largest, or 64 without `loras`.
        data: files of examples, one per task.
        loras: folders of plain LoRAs for the model, instead of `data`; the basis keeps most of their updates.

    Raises:
        ValueError: the folder has files, two tasks have the same name, examples are labeled, LoRAs are untrained or do
            not match the model's layers, both or neither of `data` and `loras` are given, or initialization fails.
    """
    names, output = _task_names(data or loras), Path(settings.output)
    if bool(data) == bool(loras):
        raise ValueError("expected --data FILES, whose first steps make the basis, or --lora FOLDERS, whose updates do")
    settings = replace(settings, data=data[0] if data else None)
    settings.check()
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):  # a killed call's lock
        raise ValueError(f"expected --output to be a new folder, and {output} has files: take another, or delete it")
    if output.is_mount() or Path.cwd().is_relative_to(output.resolve()):  # neither can be replaced at the end
        what = f"{output}, which is a mount point or has the current folder"
        raise ValueError(f"expected --output to be a new folder, got {what}: take {output}/basis")
    with locked(output):
        refuse_unwritable(output)
        make = _basis_from_first_steps if data else _basis_from_loras
        model, dtype, tasks = make(settings, data or loras, names)
        with replacing_folder(output) as folder:
            model.save_pretrained(str(folder))
            card = write_card(folder, settings, tasks, dtype)
    return card


def write_card(folder: Path, settings: Settings, tasks: Tasks, dtype: str) -> BasisCard:
    """Split a saved adapter into R and shareable A and B, and write the basis's card."""
    shared_factors.share(folder)
    digest, r = shared_factors.recorded_digest(folder / constants.FACTORS_NAME), read_config(folder)["r"]
    card = BasisCard(absolute(settings.model), digest or "", r, settings.update, tasks, dtype)
    write_json(folder / CARD_NAME, card.__dict__)
    return card


def absolute(model: str) -> str:
    """Return a model's absolute folder, or its hub id: a relative path depends on the current folder."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


MadeBasis = tuple[peft.PeftModel, str, Tasks]  # model, dtype and tasks


def _basis_from_first_steps(settings: Settings, data: Sequence[str], names: Sequence[str]) -> MadeBasis:
    settings, examples = replace(settings, eval_examples=0), {}
    for name, file in zip(names, data, strict=True):
        examples[name], _ = load_examples(replace(settings, data=file))
        refuse_labels(examples[name], file)
    run = prepare(settings, ([one for part in examples.values() for one in part], []))
    rows = iter(run.train_ids)
    encoded = {name: list(itertools.islice(rows, len(part))) for name, part in examples.items()}
    run.model = lorasb.patch(run.model, r=settings.r, target_modules=targets(settings.target_modules))
    loaders = {name: start_loader(run, rows) for name, rows in encoded.items()}
    options = {"update": settings.update, "seed": settings.seed}
    shares = initialize_basis(run.model, loaders, num_samples=settings.samples, **options)
    tasks = {name: {"examples": len(encoded[name]), "kept": shares[name]} for name in names}
    return run.model, run.precision.name, tasks


def _basis_from_loras(settings: Settings, loras: Sequence[str], names: Sequence[str]) -> MadeBasis:
    updates = {folder: joint_basis.lora_updates(Path(folder)) for folder in loras}
    layers = updates[loras[0]].keys()
    for folder, one in updates.items():
        if one.keys() != layers:
            raise ValueError(f"expected LoRAs of the same layers, and {folder} adapts others than {loras[0]}")
        if not any(update.energy for update in one.values()):
            raise ValueError(f"expected trained LoRAs, and the update of {folder} is zero: train it first")
    precision = resolve(settings.dtype, device())
    _, base = load_model(settings, LanguageModeling(), precision.dtype)
    r = settings.r or max(one.core.shape[0] for one in updates[loras[0]].values())
    model = lorasb.patch(base, r=r, target_modules=sorted(layers))
    shares = joint_basis.keep_most_of(model, updates)
    return model, precision.name, {name: {"kept": share} for name, share in zip(names, shares, strict=True)}


def _task_names(data: Sequence[str]) -> list[str]:
    """Return task names, taken from the file names."""
    paths = [path.parent if path.name in ("adapter", "lora") else path for path in map(Path, data)]  # the run's name
    names = [path.name if path.is_dir() else path.stem for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"expected a file or LoRA for each task, each with a different name, got two named {twice!r}")
    return names


def initialize_basis(model: peft.PeftModel, tasks: Mapping[str, Iterable[Batch]], **options: Any) -> dict[str, float]:
    """Initialize the active adapter from the first steps of tasks, with R = 0; return the share kept of each."""
    # a task's name may be invalid for an adapter
    batches = {f"task{i}": own for i, own in enumerate(tasks.values())}
    if len(batches) == 1:
        lorasb.initialize(model, batches["task0"], lr=BASIS_RATE, longest_start=0.0, **options)
        return dict.fromkeys(tasks, 1.0)
    report = cast(TasksReport, lorasb.initialize(model, batches, lr=BASIS_RATE, **options))
    for name in batches:
        model.delete_adapter(name)
    return dict(zip(tasks, report.shares.overall.values(), strict=True))


def read_card(folder: str | Path) -> BasisCard:
    """Read the card of a basis; raise a ValueError if the folder has none, or its A and B do not match."""
    folder = Path(folder).expanduser()  # as in `--basis=~/b`
    file = folder / CARD_NAME
    if not file.is_file() or not (folder / constants.CONFIG_NAME).is_file():
        inside = next((f" (did you mean {one.parent}?)" for one in sorted(folder.glob(f"*/{CARD_NAME}"))), "")
        raise ValueError(
            f"expected the folder of a basis (lorasb basis make), found no {CARD_NAME} in {folder}{inside}"
        )
    try:
        card = BasisCard(**read_json(file))
    except TypeError as error:
        raise ValueError(f"{file} is no card of a basis ({error}): make the basis again") from None
    if shared_factors.recorded_digest(folder / constants.FACTORS_NAME) != card.digest:
        raise ValueError(f"{folder} has other A and B than its {CARD_NAME} says: copy the entire folder again")
    return card


def card_of(settings: Settings) -> BasisCard:
    """Read the card of a run's basis; raise a ValueError if its dtype differs from the run's."""
    card = read_card(settings.basis or "")
    if "auto" not in (card.dtype, settings.dtype) and card.dtype != settings.dtype:
        wrong = f"has A and B in {card.dtype}, got --dtype {settings.dtype}: leave --dtype out"
        raise ValueError(f"--basis {settings.basis} {wrong}")
    return card


def load_basis(run: Run) -> dict[str, float] | None:
    """Load a run's basis, measure the rate if none is given, and return how well the data fits; None if unknown."""
    settings, card = run.settings, card_of(run.settings)
    load_adapter(run, Path(settings.basis or ""))
    if not card.of_loras:
        found = _fit(run, card)
        run.fit = {"share": found.share, "random": found.random}
    if settings.lr is None:
        run.lr = settings.default_rate(card.r)
    if run.measures_rate:
        name, layers = adapted_layers(run.model, None)
        options = InitOptions(adapter=name, num_samples=settings.samples, seed=settings.seed)
        run.lr = rate_of_initialized(run.model, layers, start_loader(run, run.train_ids), options)
    return run.fit


def _fit(run: Run, card: BasisCard) -> BasisFit:
    settings, loader = run.settings, start_loader(run, run.train_ids)
    return lorasb.basis_fit(run.model, loader, update=card.update, num_samples=settings.samples, seed=settings.seed)


def fit_basis(settings: Settings) -> BasisFit:
    """Measure how well the examples of `settings.data` fit the basis in `settings.basis`."""
    card = read_card(settings.basis or "")
    if card.of_loras:
        known = f"{settings.basis} was made of LoRAs, whose directions hold little of any first step"
        raise ValueError(f"{known}, so the fit predicts nothing: train on it and on a separate basis, and compare")
    settings = replace(settings, dtype=card.dtype)
    settings.check()
    run = prepare(replace(settings, eval_examples=0))
    check_adapter(run)
    load_adapter(run, Path(settings.basis or ""))
    return _fit(run, card)
