"""A run's folder: whose it is, how far the run in it came, and what is left to do.

While a run is under way, `checkpoints/` has `run.json` (what decides the run), `before.json` (the evaluation before
training), `start/` (the initialized adapter and its report) and the last two checkpoints. It goes once the results and,
last of all, `summary.json` are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..utils.atomic_files import replacing_folder, write_json
from . import checkpoints
from .config_file import CONFIG_NAME, write_config
from .evaluation import Evaluation
from .settings import Settings, listed, option

NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class State:
    """How far the run in a folder came."""

    kind: str
    checkpoint: str | None = None
    lines: list[str] = field(default_factory=list)  # what people are to know of it
    cut_off: list[str] = field(default_factory=list)  # checkpoints that are not whole


class RunFolder:
    """The files of a run that is under way."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.start = self.checkpoints / "start"

    def look(self, settings: Settings, identity: dict[str, Any]) -> State:
        """How far the run came that `identity` is of, as `--resume` asks.

        Raises:
            ValueError: the folder, or the checkpoint that was asked for, is another run's; or it is not whole.
        """
        if settings.resume == "never":
            return State(NEW)
        running = _read(self.checkpoints / "run.json")
        if settings.resume != "auto":
            mark = self._checkpoint(Path(settings.resume), identity)
            if running is not None:
                self._same(running, identity)
            return State(UNFINISHED, settings.resume, [f"going on from {settings.resume}, step {mark.step}"])
        finished = (_read(self.folder / SUMMARY_NAME) or {}).get("identity")
        if finished is not None and running in (None, finished):
            self._same(finished, identity)
            return State(
                FINISHED,
                None,
                [f"the run in {self.folder} is finished: these are its results (--resume never runs it anew)"],
            )
        if running is None:
            return State(NEW)
        self._same(running, identity)
        best, broken = checkpoints.last(self.checkpoints)
        lines = [f"{one} was cut off while it was written, and is left out" for one in broken]
        where = f"{best}, step {checkpoints.step_of(best)}" if best else "before its first checkpoint"
        lines.append(f"going on with the run in {self.folder}: {where}")
        return State(UNFINISHED, str(best) if best else None, lines, [str(one) for one in broken])

    def _checkpoint(self, path: Path, identity: dict[str, Any]) -> checkpoints.Mark:
        if not path.is_dir():
            raise ValueError(f"--resume is auto, never or the folder of a checkpoint, and there is none at {path}")
        mark = checkpoints.read(path)
        if mark is None:
            raise ValueError(
                f"--resume {path}: this is no whole checkpoint of lorasb finetune (it was cut off, or it is something "
                "else); --resume auto takes the last whole one of the run in --output"
            )
        different = differences(mark.identity, identity)
        if different:
            raise ValueError(f"--resume {path}: this checkpoint is of another run: {different}")
        return mark

    def _same(self, theirs: dict[str, Any], identity: dict[str, Any]) -> None:
        different = differences(theirs, identity)
        if different:
            raise ValueError(
                f"{self.folder} has a run with other settings: {different}. Take another --output, or --resume never "
                "to start anew in this one"
            )

    def begin(self, state: State, settings: Settings, identity: dict[str, Any]) -> None:
        """Make the folder ready: of a new run it says whose it is, of another what is not whole goes."""
        if state.kind == NEW:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            (self.folder / SUMMARY_NAME).unlink(missing_ok=True)
        for broken in state.cut_off:
            shutil.rmtree(broken, ignore_errors=True)
        write_json(self.checkpoints / "run.json", identity)
        write_config(self.folder / CONFIG_NAME, settings)

    def before(self) -> Evaluation | None:
        """The evaluation before training, where it was finished."""
        found = _read(self.checkpoints / "before.json")
        return None if found is None else Evaluation(found["loss"], found["accuracy"], tuple(found["answers"]))

    def save_before(self, before: Evaluation) -> None:
        """Keep it, so that nobody evaluates again."""
        write_json(self.checkpoints / "before.json", asdict(before))

    def save_start(self, save: Callable[[Path], None], seconds: float) -> None:
        """Keep the initialized adapter, whole or not at all."""
        with replacing_folder(self.start) as folder:
            save(folder)
            write_json(folder / "seconds.json", {"seconds": seconds})

    def start_seconds(self) -> float | None:
        """How long the initialization took; None where it was not finished."""
        found = _read(self.start / "seconds.json")
        return None if found is None else float(found["seconds"])

    def end(self) -> None:
        """The results are there: what a run that is under way needs may go."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def identity_of(settings: Settings, **resolved: Any) -> dict[str, Any]:
    """What decides a run: settings, and what they came to here (dtype, device, processes, examples)."""
    found: dict[str, Any] = json.loads(json.dumps(settings.deciding() | resolved))
    return found


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What is not alike, by the options' names; "" where all is."""
    settings = {one.name for one, _ in listed(Settings)}
    found = []
    for name in ours | theirs:
        was, now = theirs.get(name), ours.get(name)
        if was == now:
            continue
        if name == "examples":
            found.append("the examples themselves have changed")
        else:
            found.append(f"{option(name) if name in settings else name} was {was} and is {now}")
    return ", ".join(found)


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON file; None where there is none, or one that is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
