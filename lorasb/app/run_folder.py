"""The output folder of a run: find which run it belongs to, and how far that run got.

During a run, `checkpoints/` has `run.json` (the run's identity), `before.json` (the evaluation before training),
`start/` (the initialized adapter and its report) and the last two checkpoints. These are removed once the results are
written, `summary.json` last.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import Trainer

from ..checkpoints.shared_factors import share
from ..distributed.process_group import Processes
from ..utils.atomic_files import sha256, write_json
from ..utils.reading import Json, read_json
from .settings import CONFIG_NAME, Settings, option, write_config

T = TypeVar("T")
# Written last: a folder without it was not completely written, and files that differ from its digests are damaged.
MARK = "complete.json"


@dataclass(frozen=True)
class Mark:
    """The content of complete.json, which marks a checkpoint as complete."""

    step: int
    seconds: float  # training time up to this step, including time before resumes
    identity: Json  # of the run, see `run_folder.identity_of`
    files: dict[str, str]  # name -> SHA-256


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for other folders."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and folder.is_dir() else -1


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, complete or not, sorted by step."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def mark_complete(folder: Path, seconds: float, identity: Json) -> None:
    """Mark a checkpoint as complete, then remove complete checkpoints older than the last two."""
    write_json(folder / MARK, Mark(step_of(folder), seconds, identity, digests(folder)).__dict__)
    for old in complete_checkpoints(folder.parent)[:-2]:  # two, in case the last one gets damaged
        shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder except its mark, by name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARK)
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def read_record(kind: type[T], file: Path) -> T | None:
    """Read a dataclass, or a dict, from a JSON file; None if it is missing or damaged; other OSErrors are raised."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return kind(**read_json(file))
    return None


def read_mark(folder: Path) -> Mark | None:
    """Read a checkpoint's mark; None if the checkpoint is incomplete."""
    return read_record(Mark, folder / MARK)


def find_fault(folder: Path, written: Mark | Start | None) -> str | None:
    """Describe how a folder differs from the files that were written into it; None if it does not."""
    if written is None:
        return "was cut off while it was written"
    for name, expected in written.files.items():
        file = folder / name
        if not file.is_file():
            return f"is incomplete ({name} is missing)"
        if sha256(file) != expected:
            return f"is damaged ({name} is not what was written)"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    return [path for path in checkpoints(folder) if read_mark(path)]


NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"
SUMMARY_NAME, ANSWERS_NAME = "summary.json", "answers.json"
PICTURES = ("loss.png", "energy.png")
# The summary is moved first: without it, the folder has no finished run.
RESULT_NAMES = (SUMMARY_NAME, ANSWERS_NAME, CONFIG_NAME, "adapter", "lora", "report.json", *PICTURES, "tensorboard")
OWN_NAMES = RUN_NAME, BEFORE_NAME, START_NAME = "run.json", "before.json", "start"  # in checkpoints/
START_FILE = "start.json"  # written last: its presence marks start/ as complete


@dataclass(frozen=True)
class State:
    """State of the run in a folder: NEW, UNFINISHED (resumes from `checkpoint`, or from its start), or FINISHED."""

    kind: str
    checkpoint: str | None = None
    lines: Sequence[str] = ()  # messages for the user
    left_out: Sequence[str] = ()  # folders not used: incomplete or damaged checkpoints, or a damaged start


@dataclass(frozen=True)
class Start:
    """The initialization that start.json describes."""

    seconds: float  # time that the initialization took
    lr: float  # learning rate for which R was initialized
    files: dict[str, str]  # name -> SHA-256
    fit: dict[str, float] | None = None  # see `Run.fit`; None without a basis
    rows: str = ""  # SHA-256 of the training examples' tokens; "" in runs of lorasb 0.3


class RunFolder:
    """The files of an unfinished run with these settings and this identity."""

    def __init__(self, settings: Settings, identity: Json) -> None:
        self.settings, self.identity = settings, identity
        self.folder = Path(settings.output)
        self.checkpoints = self.folder / "checkpoints"
        self.before, self.start = self.checkpoints / BEFORE_NAME, self.checkpoints / START_NAME

    def look(self) -> State:
        """Return the state of the run that `--resume` selects; change nothing."""
        self._refuse_foreign()
        if self.settings.resume == "never":
            return self._new()
        running = self._running()
        # If run.json and the summary belong to different runs, the folder was reused, and run.json's is unfinished.
        finished = (read_record(dict, self.folder / SUMMARY_NAME) or {}).get("identity")
        finished = finished if running in (None, finished) else None
        for saved in (running, finished):
            if saved is not None and (different := differences(saved, self.identity)):
                advice = "Take another --output, or --resume never to start over in this one"
                raise ValueError(f"{self.folder} has a run with other settings: {different}. {advice}")
        if self.settings.resume != "auto":
            return self._look_at_checkpoint(Path(self.settings.resume))
        if finished is not None:
            line = f"the run in {self.folder} is finished: these are its results (to run it again: --resume never)"
            return State(FINISHED, None, [line])
        return self._new() if running is None else self._look_at_last()

    def _new(self) -> State:
        """Return the state of a new run, which moves earlier results; a ValueError if its basis is among them."""
        found, basis = self._earlier_results(), self.settings.basis
        if basis is not None and any(Path(basis).resolve().is_relative_to(path.resolve()) for path in found):
            raise ValueError(
                f"expected a --basis outside of the results in {self.folder}, which a new run moves to another folder, "
                f"got {basis}: take another --output"
            )
        line = f"the earlier results in {self.folder} are moved to {self._free('former')}"
        return State(NEW, None, [line] if found else [])

    def _refuse_foreign(self) -> None:
        """Raise a ValueError if `checkpoints/` has checkpoints that lorasb did not write: a run removes checkpoints."""
        if (self.checkpoints / RUN_NAME).exists():
            return
        for path in checkpoints(self.checkpoints):
            if read_mark(path) is None:
                removes = "which removes its checkpoints at the end: take another --output, or move it away"
                raise ValueError(f"{path} was not written by lorasb finetune, {removes}")

    def _running(self) -> Json | None:
        """Return the unfinished run's identity; None if there is none, or it has other settings and never began."""
        file, found = self.checkpoints / RUN_NAME, None
        with suppress(OSError):
            found = read_record(dict, file)
        if found is None and file.exists():
            advice = "fix its permissions, or give --resume never to start over"
            raise ValueError(f"{file}, which identifies the run of these checkpoints, cannot be read: {advice}")
        begun = self.load_start() is not None or checkpoints(self.checkpoints)
        return found if begun or not differences(found or {}, self.identity) else None

    def _look_at_checkpoint(self, path: Path) -> State:
        """Return the state that resumes from this checkpoint, which the user named."""
        if not path.is_dir():
            raise ValueError(f"--resume is auto, never or the folder of a checkpoint, and there is none at {path}")
        mark = read_mark(path)
        wrong = find_fault(path, mark) if mark else "was cut off, or is something else"
        if mark is None or wrong is not None:
            other = "--resume auto takes the last complete one of the run in --output"
            raise ValueError(f"--resume {path}: this is no complete checkpoint of lorasb finetune, it {wrong}: {other}")
        if different := differences(mark.identity, self.identity):
            raise ValueError(f"--resume {path}: this checkpoint is of another run: {different}")
        return State(UNFINISHED, str(path), [f"resuming from {path}, step {mark.step}"])

    def _look_at_last(self) -> State:
        """Return the state that resumes from the last intact checkpoint, or from the start."""
        best, faults = None, dict[Path, str]()
        for path in reversed(checkpoints(self.checkpoints)):
            fault = find_fault(path, read_mark(path))
            if fault is None:
                best = path
                break
            faults[path] = fault
        start = self.load_start()
        if start and (fault := find_fault(self.start, start)):
            faults[self.start] = fault
        lines = [f"{path} {fault}, and is left out" for path, fault in faults.items()]
        where = f"{best}, step {step_of(best)}" if best else "from step 0, as it has no checkpoint yet"
        lines.append(f"resuming the run in {self.folder}: {where}")
        return State(UNFINISHED, str(best) if best else None, lines, [str(path) for path in faults])

    def begin(self, state: State) -> None:
        """Prepare the folder: set an earlier run's files aside, remove broken checkpoints, write the run's identity."""
        if state.kind == NEW:
            self._set_aside()
            self.end()
        for broken in state.left_out:
            shutil.rmtree(broken, ignore_errors=True)
        # After the clean-up: run.json claims the folder, so nothing of another run may be left when it appears.
        write_json(self.checkpoints / RUN_NAME, self.identity)
        write_config(self.folder / CONFIG_NAME, self.settings)

    def load_start(self) -> Start | None:
        """Return the initialization's results; None if it was not completed."""
        return read_record(Start, self.start / START_FILE)

    def end(self) -> None:
        """Remove the run's files in `checkpoints/`, run.json last: files that a kill leaves are still known as a run's.

        The folder stays if it has other files or is a symlink, perhaps to a larger disk.
        """
        cut_off = (path for name in OWN_NAMES for path in self.checkpoints.glob(f".{name}.*"))  # by a kill
        for path in (*checkpoints(self.checkpoints), *cut_off, self.start, self.before, self.checkpoints / RUN_NAME):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.checkpoints.rmdir()

    def _set_aside(self) -> None:
        """Move files named like a run's results into a new folder: `former/`, then `former-2/`, ..."""
        has_run = any((self.folder / name).exists() for name in (SUMMARY_NAME, f"checkpoints/{RUN_NAME}"))
        if not has_run and (config := self.folder / CONFIG_NAME).exists():  # written by the user, perhaps with comments
            config.replace(self._free("former-config", ".yaml"))
        if found := self._earlier_results():
            former = self._free("former")
            former.mkdir()
            for path in found:
                path.replace(former / path.name)

    def _earlier_results(self) -> list[Path]:
        """Return existing files and folders named like a run's results; none if there is only a configuration."""
        found = [path for name in RESULT_NAMES if (path := self.folder / name).exists()]
        return [] if {path.name for path in found} <= {CONFIG_NAME} else found

    def _free(self, name: str, suffix: str = "") -> Path:
        """Return a free path in the folder: `name`, then `name`-2, ..."""
        names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
        return next(path for one in names if not (path := self.folder / f"{one}{suffix}").exists())


def identity_of(settings: Settings, **resolved: object) -> Json:
    """Identity of a run: the settings that determine its result, and resolved dtype, device, processes and examples."""
    deciding = asdict(settings)
    for name in ("output", "resume", "save_steps", "report_to"):
        del deciding[name]
    # through JSON, so that it compares equal to what was read from a file (tuples become lists)
    return json.loads(json.dumps(deciding | resolved))


# identity entries that are digests, and what messages call them
CHANGED = {
    "examples": "the examples, or what this version holds out of them,",
    "basis_digest": "A and B of the basis",
    "rewards": "the contents of --rl's file, which earlier versions did not record,",
}


def differences(saved: Json, current: Json) -> str:
    """Describe the differences between two identities, by option name; "" if there are none."""
    messages = []
    for name in current | saved:
        old, new = ("not given" if one.get(name) is None else one[name] for one in (saved, current))
        if old == new:
            continue
        if name not in saved and hasattr(Settings, name):
            messages.append(f"an earlier version of lorasb made it, without {option(name)}")
        elif name in CHANGED:
            messages.append(f"{CHANGED[name]} have changed")
        else:
            messages.append(f"{option(name) if hasattr(Settings, name) else name} was {old} and is {new}")
    return ", ".join(messages)


class MarkedCheckpoints(Trainer):
    """Trainer that marks its checkpoints as complete, and removes those that could not be written."""

    identity: Json  # of the run
    started: float  # `time.perf_counter()` when training began, minus the seconds trained before a resume
    set_epoch: Callable[[int], object]  # selects an epoch's order of examples

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        writes = self.args.should_save
        if writes:
            # A run resumed from an earlier step rewrites this folder, which must not count as complete meanwhile.
            (folder / MARK).unlink(missing_ok=True)
        try:
            with Processes().together("saving a checkpoint"):
                super()._save_checkpoint(model, trial)
            if writes:
                share(folder)  # before the mark, which lists the files and their digests
                mark_complete(folder, time.perf_counter() - self.started, self.identity)
        except Exception as caught:  # such as a full disk: torch and safetensors raise various types
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"the checkpoint {folder} cannot be written: {' '.join(str(caught).split())}. Earlier ones are "
                "intact: make room and start the same command again"
            ) from caught
