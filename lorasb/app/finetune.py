"""`lorasb finetune`: a run from settings to results, skipping stages that an earlier start completed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from accelerate import PartialState

import lorasb

from ..constants import DOCS
from ..distributed.process_group import Processes
from ..init import InitReport
from ..ops.registry import current_backend
from ..utils.atomic_files import locked, replacing_folder, sha256, write_json
from ..utils.precision import resolve
from . import results
from .adapter import REPORT_NAME, adapt, card_of, check_adapter, load_adapter, load_basis, load_report
from .data import digest, load_examples
from .evaluation import Evaluation
from .prepare import Run, device, load_adapters, prepare, save_adapter
from .reinforce import grpo_trainer, judge_of, reward_file
from .results import Result
from .run_folder import FINISHED, NEW, START_FILE, RunFolder, Start, State, digests, identity_of, read_record
from .settings import Settings
from .tables import basis_line
from .terminal import Stop, console
from .train import find_rate, run_trainer, train


def run_finetune(settings: Settings) -> Result:
    """Fine-tune, evaluate before and after, and write the run's files into `settings.output`."""
    # The files are config.yaml and those of `results.save`. An interrupted run resumes from its last checkpoint, with a
    # result bit-identical to an uninterrupted run's; a finished run returns its saved results.
    settings.check()
    current_backend()  # raises for an unusable LORASB_BACKEND now, before any work
    if settings.rl is not None:
        judge_of(settings)  # raises if `--rl` names no valid reward
    with joined() as processes, Stop() as stop, ExitStack() as held:
        settings.check_processes(processes.world_size)
        card = card_of(settings) if settings.basis is not None else None  # before the model is loaded and evaluated
        if card is not None and settings.dtype == "auto":
            settings = replace(settings, dtype=card.dtype)
        precision = resolve(settings.dtype, device())
        examples = load_examples(settings)
        resolved = {"dtype": precision.name, "device": device(), "processes": processes.world_size}
        deciding = {"examples": digest(*examples)} | ({} if card is None else {"basis_digest": card.digest})
        if rewards := reward_file(settings):
            deciding["rewards"] = sha256(rewards)
        folder = RunFolder(settings, identity_of(settings, **resolved, **deciding))
        state = _look_up_state(folder, processes, held)
        if state.kind == FINISHED:
            return results.load(folder.folder)
        is_first_rank = processes.rank == 0
        run = prepare(settings, examples)
        if state.kind == NEW:
            check_adapter(run)  # before the model is evaluated
        if is_first_rank:
            folder.begin(state)
        processes.all_gather(0)  # barrier: no rank reads the folder before rank 0 has cleared an earlier run's files
        before = read_record(Evaluation, folder.before) or run.evaluate("held-out examples, before")
        if is_first_rank:
            write_json(folder.before, asdict(before))
        report, seconds = _start(run, folder, is_first_rank)
        make = run_trainer if settings.rl is None else grpo_trainer
        history, train_seconds = train(run, make, folder, state.checkpoint, stop)
        after = run.evaluate("held-out examples, after")
        summary = results.summarize(run, before, after, seconds, history, train_seconds) | {"identity": folder.identity}
        result = Result(summary, run.held_out.examples, before, after, report)
        if is_first_rank:
            results.save(run, result, history)
            folder.end()
        processes.all_gather(0)  # barrier: no rank returns before the files are written
    return result


def _look_up_state(folder: RunFolder, processes: Processes, held: ExitStack) -> State:
    """Lock the folder and read the run's state on rank 0; raise its errors on every rank."""
    state = None
    with processes.together("looking for an earlier run"):
        if processes.rank == 0:  # only rank 0: on other hosts the path may be another folder
            held.enter_context(locked(folder.folder))
            state = folder.look()
    shared_state = State(**processes.gather_json(state.__dict__ if state else None)[0])
    for line in shared_state.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return shared_state


def _start(run: Run, folder: RunFolder, is_first_rank: bool) -> tuple[InitReport | None, float]:
    """Load the initialized adapter, or create and save it; return its report and the seconds that took."""
    earlier, tokens = folder.load_start(), hashlib.sha256()
    for row in run.train_ids:
        tokens.update(repr(row).encode())
    rows = tokens.hexdigest()
    if earlier is not None:
        if earlier.rows not in ("", rows):
            raise ValueError(
                f"--output {folder.folder}: the tokenizer or its chat template tokenizes the examples differently than "
                "when this run began: restore it, or start again with --resume never"
            )
        run.lr, run.fit = earlier.lr, earlier.fit
        load_adapter(run, folder.start)
        load_adapters(run, folder.start)
        return load_report(folder.start), earlier.seconds
    report, started = None, time.perf_counter()
    if run.settings.basis is not None:
        if fit := load_basis(run):
            console.print(basis_line(**fit))  # before training, so that the user can stop here
    else:
        report = adapt(run)
    seconds = time.perf_counter() - started if run.settings.method != "lora" else 0.0
    if run.settings.find_lr or run.measures_rate:
        run.lr = find_rate(run)
    # they share A, B and the start of R with the basis, which was initialized on everyone's examples
    lorasb.add_adapters(run.model, run.adapters, basis_start="same")
    if is_first_rank:
        with replacing_folder(folder.start) as target:
            save_adapter(run, target)
            if report is not None:
                report.save(target / REPORT_NAME)
            write_json(target / START_FILE, asdict(Start(seconds, run.lr, digests(target), run.fit, rows)))
    return report, seconds


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the process group, if there is one, for the duration of the block; only rank 0 prints."""
    # A group that was initialized here is destroyed at the end: gloo's threads would abort the interpreter's exit.
    initialized_here = dist.is_available() and not dist.is_initialized()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # accelerate launch announces the engine to its processes in these variables
            for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
                if os.environ.get(variable, "").lower() in ("1", "true"):
                    raise ValueError(
                        f"lorasb finetune trains a full model per process (DDP), and this launch asks for {engine}: "
                        f"write a script with Trainer and lorasb.InitCallback() for that ({DOCS}/several-gpus.md)"
                    )
            # chooses this rank's backend (nccl, gloo) and device; Trainer uses the same state
            PartialState(cpu=not torch.cuda.is_available())
        processes = Processes()
        console.quiet = processes.rank > 0
        yield processes
    finally:
        if initialized_here and dist.is_initialized():
            dist.destroy_process_group()
