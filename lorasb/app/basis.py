"""`lorasb basis`: a basis that adapters share, made from the first steps of tasks, and how well data fits it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

import lorasb

from ..checkpoints import shared_factors
from ..constants import CONFIG_NAME, FACTORS_NAME
from ..init import BasisFit, TasksReport
from ..init.pipeline import rate_of_initialized
from ..init.sampling import Batch
from ..init.task import InitOptions
from ..layers.lookup import adapted_layers
from ..utils.atomic_files import locked, replacing_folder, write_json
from ..utils.reading import read_json
from .adapter import load_adapter, start_loader
from .data import load_examples
from .evaluation import LanguageModeling
from .prepare import Run, prepare
from .settings import Settings, targets

CARD_NAME = "basis.json"
RATE = 1e-3  # η of the tasks' first steps, whose length is no part of a basis


@dataclass(frozen=True)
class BasisCard:
    """Description of a basis, in its folder's basis.json."""

    model: str  # folder or hub id, as it was given
    digest: str  # SHA-256 of A and B, which every adapter on the basis names
    r: int
    update: str
    tasks: dict[str, dict[str, float]]  # task -> number of its examples, and the share of its first step that is kept


def make_basis(settings: Settings, data: Sequence[str]) -> BasisCard:
    """Make a basis of rank `settings.r` from the first steps of one task or more, and write it into `settings.output`.

    Raises:
        ValueError: two files of one name, labeled examples, or what initialization refuses.
    """
    names = _names(data)
    settings = replace(settings, data=data[0], eval_examples=1)
    settings.check()
    with locked(settings.output):
        run = prepare(settings)
        encoded = {names[0]: run.train_ids}
        for name, file in zip(names[1:], data[1:], strict=True):
            examples, _ = load_examples(replace(settings, data=file))
            encoded[name] = [run.problem.encode(one, run.tokenizer, settings.max_length) for one in examples]
        if not isinstance(run.problem, LanguageModeling):
            raise ValueError("expected files of prompt and completion, got labeled examples: a basis has no head")
        run.model = lorasb.patch(run.model, r=settings.r, target_modules=targets(settings.target_modules))
        loaders = {name: start_loader(run, rows) for name, rows in encoded.items()}
        options = {"update": settings.update, "seed": settings.seed}
        shares = initialize_basis(run.model, loaders, num_samples=settings.samples, **options)
        tasks = {name: {"examples": len(encoded[name]), "kept": shares[name]} for name in names}
        with replacing_folder(Path(settings.output)) as folder:
            run.model.save_pretrained(str(folder))
            shared_factors.share(folder)
            digest = shared_factors.recorded_digest(folder / FACTORS_NAME)
            card = BasisCard(settings.model, digest or "", run.model.peft_config["default"].r, settings.update, tasks)
            write_json(folder / CARD_NAME, card.__dict__)
    return card


def _names(data: Sequence[str]) -> list[str]:
    """Names of the tasks, after their files."""
    names = [Path(file).stem for file in data]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"expected a file of examples for each task, each with another name, got two named {twice!r}")
    return names


def initialize_basis(model: PeftModel, tasks: Mapping[str, Iterable[Batch]], **options: Any) -> dict[str, float]:
    """Initialize the active adapter, with R = 0, from the first steps of tasks; returns what it keeps of each."""
    # tasks may have names that no adapter can have
    batches = {f"task{i}": own for i, own in enumerate(tasks.values())}
    if len(batches) == 1:
        lorasb.initialize(model, batches["task0"], lr=RATE, longest_start=0.0, **options)
        return dict.fromkeys(tasks, 1.0)
    report = cast(TasksReport, lorasb.initialize(model, batches, lr=RATE, **options))
    for name in batches:
        model.delete_adapter(name)
    return dict(zip(tasks, report.shares.overall.values(), strict=True))


def read_card(folder: str | Path) -> BasisCard:
    """The card of a basis; a ValueError if the folder is none, or its A and B are others."""
    file = Path(folder) / CARD_NAME
    if not file.is_file() or not (Path(folder) / CONFIG_NAME).is_file():
        raise ValueError(f"expected the folder of a basis (lorasb basis make), found no {CARD_NAME} in {folder}")
    try:
        card = BasisCard(**read_json(file))
    except TypeError as error:
        raise ValueError(f"{file} is no card of a basis ({error}): make the basis again") from None
    if shared_factors.recorded_digest(Path(folder) / FACTORS_NAME) != card.digest:
        raise ValueError(f"{folder} has other A and B than its {CARD_NAME} says: copy the folder again, all of it")
    return card


def card_of(settings: Settings) -> BasisCard:
    """The card of a run's basis; a ValueError if it was made on another model."""
    card = read_card(settings.basis or "")
    if card.model != settings.model:
        wrong = f"was made on --model {card.model}, got {settings.model}: leave --model out"
        raise ValueError(f"--basis {settings.basis} {wrong}")
    return card


def load_basis(run: Run) -> None:
    """Load the basis of a run, measure how well its data fits, and the learning rate if none is given."""
    settings = run.settings
    found = _load_and_fit(run, card_of(settings))
    run.fit = {"share": found.share, "random": found.random}
    run.measured = settings.lr is None and settings.rl is None
    if run.measured:
        name, layers = adapted_layers(run.model, None)
        options = InitOptions(adapter=name, num_samples=settings.samples, seed=settings.seed)
        run.lr = rate_of_initialized(run.model, layers, start_loader(run, run.train_ids), options)


def _load_and_fit(run: Run, card: BasisCard) -> BasisFit:
    settings = run.settings
    load_adapter(run, Path(settings.basis or ""))
    loader = start_loader(run, run.train_ids)
    return lorasb.basis_fit(run.model, loader, update=card.update, num_samples=settings.samples, seed=settings.seed)


def fit(settings: Settings) -> BasisFit:
    """Measure how well the examples of `settings.data` fit the basis in `settings.basis`."""
    card = read_card(settings.basis or "")
    settings = replace(settings, model=card.model, eval_examples=1)
    settings.check()
    return _load_and_fit(prepare(settings), card)
