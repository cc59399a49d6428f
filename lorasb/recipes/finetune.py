"""`lorasb finetune`, from its settings to its results; what was done already is not done again."""

from __future__ import annotations

from typing import Any

from ..distributed.process_group import Processes
from ..ops.registry import current_backend
from ..utils.precision import resolve, slowdown_message
from . import launch, results
from .adapter import adapt, load_adapter, load_report, save_start
from .console import console, errors
from .data import digest, load_examples
from .prepare import Run, device, prepare
from .results import Result
from .run_folder import FINISHED, RunFolder, State, identity_of
from .settings import Settings
from .signals import Stop

GO_ON = "stopped: the same command goes on from here"


def run_finetune(settings: Settings) -> Result:
    """Fine-tune, evaluate before and after, and write the run's files into `settings.output`.

    The files are those of `results.save`, and config.yaml. A run that was cut off goes on from its last checkpoint to
    the bits it would have ended in; a finished one gives its results again.

    Raises:
        ValueError: bad settings or data, or a folder with another run in it.
        OSError: a file cannot be written; what was written before is whole.
        StoppedError: the user ended the run.
    """
    settings.check()
    current_backend()  # an unusable LORASB_BACKEND is better met now than after the first evaluation
    from .train import check_report, train

    check_report(settings)
    with launch.joined() as processes, Stop(GO_ON) as stop:
        precision = resolve(settings.dtype, device())
        examples = load_examples(settings)
        facts = {
            "dtype": precision.name,
            "device": device(),
            "processes": processes.world_size,
            "examples": digest(*examples),
        }
        identity, folder = identity_of(settings, **facts), RunFolder(settings.output)
        state = _look(folder, settings, identity, processes)
        if state.kind == FINISHED:
            return results.load(folder.folder)
        _warn(settings, processes)
        run = prepare(settings, examples)
        first = processes.rank == 0
        if first:
            folder.begin(state, settings, identity)
        processes.all_gather(0)  # nobody reads what an earlier run left
        before = folder.before() or run.evaluate("held-out problems, before")
        if first:
            folder.save_before(before)
        report, seconds = _start(run, folder, first)
        trained = train(run, folder.checkpoints, identity, state.checkpoint, stop)
        after = run.evaluate("held-out problems, after")
        summary = results.summarize(run, before, after, seconds, trained, identity)
        result = Result(summary, run.held_out, before, after, report)
        if first:
            results.save(run, result, trained.history)
            folder.end()
        processes.all_gather(0)  # the others leave once the files are there
    return result


def _look(folder: RunFolder, settings: Settings, identity: dict[str, Any], processes: Processes) -> State:
    """How far the run came, as the first process sees it; all raise where it refuses."""
    state, error = None, None
    try:
        state = folder.look(settings, identity) if processes.rank == 0 else None
    except ValueError as caught:
        error = caught
    processes.raise_on_every_rank(error, "looking for an earlier run")
    found = State(**launch.gather_json(state.__dict__ if state else None, processes)[0])
    for line in found.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return found


def _warn(settings: Settings, processes: Processes) -> None:
    """One line where a 16-bit dtype was asked for that this CPU has no products for."""
    if settings.dtype != "auto" and device() == "cpu" and processes.rank == 0:
        line = slowdown_message(settings.dtype)
        if line is not None:
            errors.print(f"[bold yellow]lorasb:[/] {line}", highlight=False)


def _start(run: Run, folder: RunFolder, first: bool) -> tuple[Any, float]:
    """The initialized adapter, made now or before, with its report and the seconds that it took."""
    seconds = folder.start_seconds()
    if seconds is not None:
        load_adapter(run, folder.start)
        return load_report(folder.start), seconds
    report, seconds = adapt(run)
    if first:
        folder.save_start(lambda target: save_start(run, report, target), seconds)
    return report, seconds
