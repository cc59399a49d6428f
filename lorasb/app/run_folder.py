"""The output folder of a run: which run it belongs to, and how far that run came.

During a run, `checkpoints/` has `run.json` (the run's identity), `before.json` (the evaluation before training),
`start/` (the initialized adapter and its report) and the last two checkpoints. It is removed once the results and, as
the last file, `summary.json` are written.
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
# Written last: a folder without it was interrupted while being written, and files of other contents are damaged.
MARK = "complete.json"


@dataclass(frozen=True)
class Mark:
    """The content of complete.json, which marks a checkpoint as complete."""

    step: int
    seconds: float  # training time up to this step, over all starts
    identity: Json  # of the run, see `run_folder.identity_of`
    files: dict[str, str]  # name -> SHA-256


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for other folders."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and folder.is_dir() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, in the order of their steps."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def mark_complete(folder: Path, seconds: float, identity: Json) -> None:
    """Mark a checkpoint as complete, then remove complete checkpoints older than the last two."""
    write_json(folder / MARK, Mark(step_of(folder), seconds, identity, digests(folder)).__dict__)
    for old in complete_checkpoints(folder.parent)[:-2]:  # the one before, in case the last gets damaged
        shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder but its mark, by name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARK)
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def read_record(kind: type[T], file: Path) -> T | None:
    """A dataclass, or a dict, from a JSON file; None if the file is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return kind(**read_json(file))
    return None


def read_mark(folder: Path) -> Mark | None:
    """A checkpoint's mark; None if the checkpoint is incomplete."""
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
# The summary first: without it the folder has no finished run.
RESULT_NAMES = (SUMMARY_NAME, ANSWERS_NAME, CONFIG_NAME, "adapter", "lora", "report.json", *PICTURES, "tensorboard")
OWN_NAMES = RUN_NAME, BEFORE_NAME, START_NAME = "run.json", "before.json", "start"  # in checkpoints/
START_FILE = "start.json"  # written last: its presence says that start/ is complete


@dataclass(frozen=True)
class State:
    """State of the run in a folder: NEW, UNFINISHED (resumes from `checkpoint`, or from its start), or FINISHED."""

    kind: str
    checkpoint: str | None = None
    lines: Sequence[str] = ()  # messages for the user
    left_out: Sequence[str] = ()  # incomplete and damaged checkpoints, and a damaged start


@dataclass(frozen=True)
class Start:
    """The initialization that start.json describes."""

    seconds: float  # that it took
    lr: float  # that its R belongs to
    files: dict[str, str]  # name -> SHA-256
    fit: dict[str, float] | None = None  # the run's, where it has a basis
    rows: str = ""  # SHA-256 of the training examples' tokens; runs of 0.3 have none


class RunFolder:
    """The files of an unfinished run with these settings and this identity."""

    def __init__(self, settings: Settings, identity: Json) -> None:
        self.settings, self.identity = settings, identity
        self.folder = Path(settings.output)
        self.checkpoints = self.folder / "checkpoints"
        self.before, self.start = self.checkpoints / BEFORE_NAME, self.checkpoints / START_NAME

    def look(self) -> State:
        """Return the state of the run, as `--resume` selects it; change nothing."""
        self._refuse_foreign()
        if self.settings.resume == "never":
            line = f"the results of the run in {self.folder} are moved to {self._free_former()}"
            return State(NEW, None, [line] if (self.folder / SUMMARY_NAME).exists() else [])
        running = self._running()
        # A summary in a folder with the run.json of another run: the folder was reused, and that run is unfinished.
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
        return State(NEW) if running is None else self._look_at_last()

    def _refuse_foreign(self) -> None:
        """Raise a ValueError if `checkpoints/` has files that no run of lorasb wrote: a run clears that folder."""
        if (self.checkpoints / RUN_NAME).exists() or not self.checkpoints.is_dir():
            return
        for path in sorted(self.checkpoints.iterdir()):
            # a run that was killed while it began or ended leaves some of these files
            if path.name not in OWN_NAMES and not path.name.startswith(".") and read_mark(path) is None:
                clears = f"which clears {self.checkpoints}: take another --output, or move it away"
                raise ValueError(f"{path} is not of lorasb finetune, {clears}")

    def _running(self) -> Json | None:
        """The identity of the unfinished run; None without one, or for one with other settings that never began."""
        file = self.checkpoints / RUN_NAME
        found = read_record(dict, file)
        if found is None and file.exists():
            advice = "fix its permissions, or give --resume never to start over"
            raise ValueError(f"{file}, which identifies the run of these checkpoints, cannot be read: {advice}")
        begun = self.load_start() is not None or checkpoints(self.checkpoints)
        return found if begun or not differences(found or {}, self.identity) else None

    def _look_at_checkpoint(self, path: Path) -> State:
        """Resume the run from this checkpoint, which the user named."""
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
        """Resume the run from its last complete checkpoint, or from its start."""
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
        """Remove `checkpoints/`, last of it run.json: what a kill leaves there is known as a run's."""
        for path in self.checkpoints.glob("*/"):
            shutil.rmtree(path, ignore_errors=True)
        for name in (BEFORE_NAME, RUN_NAME):
            (self.checkpoints / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # a link, perhaps to a larger disk, stays

    def _set_aside(self) -> None:
        """Move what has the names of a run's results into a folder: `former/`, then `former-2/`, ..."""
        has_run = any((self.folder / name).exists() for name in (SUMMARY_NAME, f"checkpoints/{RUN_NAME}"))
        if not has_run and (config := self.folder / CONFIG_NAME).exists():  # the user's, perhaps with comments
            config.replace(self.folder / f"former-{CONFIG_NAME}")
        found = [path for name in RESULT_NAMES if (path := self.folder / name).exists()]
        if {path.name for path in found} <= {CONFIG_NAME}:  # of a run that came to no results
            return
        former = self._free_former()
        former.mkdir()
        for path in found:
            path.replace(former / path.name)

    def _free_former(self) -> Path:
        names = itertools.chain(["former"], (f"former-{k}" for k in itertools.count(2)))
        return next(path for name in names if not (path := self.folder / name).exists())


def identity_of(settings: Settings, **resolved: object) -> Json:
    """Identity of a run: the settings that determine its result, and resolved dtype, device, processes and examples."""
    deciding = asdict(settings)
    for name in ("output", "resume", "save_steps", "report_to"):
        del deciding[name]
    # through JSON, so that it compares equal to what was read from a file (tuples become lists)
    return json.loads(json.dumps(deciding | resolved))


# what an identity has a digest of, as text
CHANGED = {"examples": "the examples, or what this version holds out of them,", "basis_digest": "A and B of the basis"}


def differences(saved: Json, current: Json) -> str:
    """Differences between two identities, by option name, as text; "" if there are none."""
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
    """Marks its checkpoints as complete, or removes what could not be written."""

    identity: Json  # of the run
    started: float  # `time.perf_counter()` when training began, less the seconds of earlier starts
    set_epoch: Callable[[int], object]  # begins the order of an epoch's examples

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        writes = self.args.should_save
        if writes:
            # The folder is written again after a resume from before it: it must not count as complete meanwhile.
            (folder / MARK).unlink(missing_ok=True)
        try:
            with Processes().together("saving a checkpoint"):
                super()._save_checkpoint(model, trial)
            if writes:
                share(folder)  # before the mark, which lists the files and their sizes
                mark_complete(folder, time.perf_counter() - self.started, self.identity)
        except Exception as caught:  # a full disk: torch and safetensors raise types of their own
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"the checkpoint {folder} cannot be written: {' '.join(str(caught).split())}. Those before it are "
                "whole: make room and start the same command again"
            ) from caught
