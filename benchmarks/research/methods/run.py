"""One run in its own process: `python -m benchmarks.research.methods.run CELL` prints its row as JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.timing import commit, dtype_name, machine_name, measured_dtype
from benchmarks.research.methods.adapters import begin_again, optimizer, put_in, refresh, sample_count, settings
from benchmarks.research.methods.grid import BY_LOSS, FULL, METHODS, WARMUP, Cell, Task, task_named
from benchmarks.research.methods.problems import Batch, Problem, load
from lorasb.training.rate_trials import JUDGED, STEPS, find_lr, refine_rate

CLIP = 1.0


def run(cell: Cell, folder: Path | None) -> dict[str, Any]:
    """Adapt, train and evaluate; return the run's row.

    Every method sees the same batches: their order depends only on the seed, as do the samples that some
    initializations need. Bases are in the benchmark's dtype (--dtype, auto by default), CoLA's in fp32. If it is bf16,
    full fine-tuning keeps its weights in fp32 under autocast, since a step of 1e-5 would be lost on bf16 weights;
    the others train fp32 adapters.
    """
    version, task, method = commit(), task_named(cell.task), METHODS[cell.method]
    task = replace(task, **{name: value for name, value in settings(cell).items() if name in ("steps", "batch")})
    dtype = measured_dtype() if method.family != FULL and task.name != "cola" else torch.float32
    problem = load(task, folder, dtype)
    # the same for every run of a task: not measured again for tasks with many runs
    before = None if cell.task in BY_LOSS else problem.loss(problem.model, cell.split)
    warmup = round(WARMUP * task.steps)
    model, init_seconds, report = put_in(problem, method, cell, lambda n: drawn(problem, task, cell.seed, n), warmup)
    if settings(cell).get("four_bits"):  # where training begins: after rounding, and its correction if any
        before = problem.loss(model, cell.split)
    started = time.perf_counter()
    found_lr = None
    if settings(cell).get("measured"):
        found_lr = refine_rate(model, batches(problem, task, cell.seed), report.rate, progress=False).lr
    if settings(cell).get("trials"):
        found_lr = find_rate(model, problem, task, cell)
    losses = train(model, problem, task, replace(cell, lr=found_lr or cell.lr), warmup)
    seconds = time.perf_counter() - started
    loss, score = problem.judge(model, cell.split)
    return {
        **cell.described(),
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "adapter_params": trained_beside_heads(model, problem),
        "init_seconds": round(init_seconds, 2),
        "seconds": round(seconds, 1),
        "steps": task.steps,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "energy": _energy(report, "sign"),
        "energy_grad": _energy(report, "grad"),
        "version": version,
        "machine": machine_name(dtype_name(dtype)),
        "date": time.strftime("%Y-%m-%d"),
        "losses": losses,
        "found_lr": found_lr or "",
        "loss_before": "" if before is None else round(before, 5),
        "loss": round(loss, 5),
        "score": round(score, 5),
    }


def trained_beside_heads(model: Any, problem: Problem) -> int:
    """Parameters that are trained; not those of a task's own head, which every method trains."""
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return sum(n for name, n in trained.items() if not any(part in name.split(".") for part in problem.head))


def _energy(report: Any, of: str) -> str:
    """The share of sign(G)'s or G's energy that the factors keep, all layers together."""
    share = getattr(report, f"energy_{of}", None)
    return "" if share is None else f"{share:.4f}"


def drawn(problem: Problem, task: Task, seed: int, count: int) -> list[Batch]:
    """Samples for an initialization."""
    chosen = random.Random(1000 + seed).sample(range(len(problem.train)), count)
    size = min(task.batch, 8)
    parts = [chosen[i : i + size] for i in range(0, count, size)]
    return [problem.collate([problem.train[i] for i in part]) for part in parts]


def batches(problem: Problem, task: Task, seed: int) -> Iterator[Batch]:
    """The steps' batches: epochs shuffled by seed."""
    draw, waiting = random.Random(seed), list[list[int]]()
    for _ in range(task.steps):
        waiting = waiting or epoch(problem, task.batch, draw)
        yield problem.collate([problem.train[i] for i in waiting.pop(0)])


def epoch(problem: Problem, batch: int, draw: random.Random) -> list[list[int]]:
    """Return one epoch's full batches; of similar lengths if the problem has them, which saves most of the padding."""
    order = list(range(len(problem.train)))
    if problem.lengths is None:
        draw.shuffle(order)
    else:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        order = get_length_grouped_indices(problem.lengths, batch, generator=generator)
    found = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
    if problem.lengths is not None:
        draw.shuffle(found)  # they come in falling order of length
    return found


def train(model: Any, problem: Problem, task: Task, cell: Cell, warmup: int) -> list[float]:
    """Train for the task's steps; the loss of each."""
    method = METHODS[cell.method]
    opt = optimizer(model, method, task, cell, problem.head)
    peaks = [group["lr"] for group in opt.param_groups]
    trained = [p for p in model.parameters() if p.requires_grad]
    wide = method.family == FULL and task.name != "cola" and measured_dtype() == torch.bfloat16
    torch.manual_seed(cell.seed)  # dropout
    model.train()
    losses, options = [], settings(cell)
    again, later = (round(options.get(name, 0) * task.steps) for name in ("again", "refresh"))
    if options.get("seeded"):
        seed_moments(model, drawn(problem, task, cell.seed, sample_count(problem, options)), opt, trained)
    for step, batch in enumerate(batches(problem, task, cell.seed)):
        if later and step == later:
            trained = refresh(model, problem, cell, lambda n: drawn(problem, task, cell.seed + 1, n), opt)
        if again and step == again:
            begin_again(model, problem, cell, lambda n: drawn(problem, task, cell.seed + 1, n), warmup)
            opt.state.clear()
        share = rate_share(step, task.steps, warmup)
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        losses.append(train_step(model, batch, opt, trained, wide))
    return losses


def find_rate(model: Any, problem: Problem, task: Task, cell: Cell) -> float:
    """The rate that `lorasb.find_lr` finds on the run's own first batches."""
    own = itertools.islice(batches(problem, task, cell.seed), STEPS + JUDGED)

    def make(parameters: list[torch.nn.Parameter], rate: float) -> Any:
        return optimizer(model, METHODS[cell.method], task, replace(cell, lr=rate), problem.head)

    return find_lr(model, own, cell.lr, optimizer=make, progress=False).lr


def seed_moments(model: Any, samples: list[Batch], opt: Any, trained: list[torch.nn.Parameter]) -> None:
    """AdamW's moments from the initialization's samples, as steps at a rate of zero leave them."""
    for group in opt.param_groups:
        group["lr"] = 0.0
    for batch in samples:
        train_step(model, batch, opt, trained, wide=False)


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Return a step's share of the peak rate: a linear warm-up, then a linear fall to zero."""
    return min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def train_step(model: Any, batch: Batch, opt: Any, trained: list[torch.nn.Parameter], wide: bool) -> float:
    """Take an optimizer step, with forward under autocast if `wide`, and return the loss before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=wide):
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    opt.step()
    opt.zero_grad()
    return float(loss.detach())


def main() -> None:
    """Run the cell that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", help="JSON of a Cell")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    described = json.loads(arguments.cell)
    cell = Cell(**{**described, "options": tuple(sorted(described["options"].items()))})
    print(json.dumps(run(cell, arguments.data_dir)))


if __name__ == "__main__":
    main()
