"""Four tasks of one model: an adapter of each on a separate basis, and on one basis for all four.

    python -m benchmarks.research.joint_basis [--r 4 16 64] [--task gcd ...] [--workers 2]
    python -m benchmarks.research.joint_basis --table

For a seed, both see the same batches in the same order, start from as many samples of their task, and train at the
same rate: the best for separate bases by validation loss, chosen with a seed outside the comparison. Runs add their
rows to benchmarks/research/results/joint-basis.csv, and existing rows are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

from rich.console import Console

from benchmarks.common.csv_files import Row
from benchmarks.common.tables import show
from benchmarks.common.timing import use_dtype
from benchmarks.research.methods import rows, runner
from benchmarks.research.methods.grid import BY_SCORE, SEEDS, SHARING, Cell
from benchmarks.research.paired.compare import half_width
from benchmarks.research.paired.grid import Entry, best_rate, cells, rows_of, swept

FILE = "joint-basis.csv"
RANKS = (16, 64, 4)
OWN, JOINT = Entry("own basis", "LoRA-SB"), Entry("joint basis", "LoRA-SB", {"joint": True})
HEAD = ("task", "r", "seeds", "loss, own", "loss, joint", "joint less own", "score, own", "score, joint", "kept")


def wanted(ranks: Sequence[int], there: Sequence[Row], tasks: Sequence[str] = tuple(BY_SCORE)) -> list[Cell]:
    """Return the next runs: sweeps, and the seeds of finished sweeps."""
    found: list[Cell] = []
    for r in ranks:
        for task in tasks:
            found += cells(task, OWN, r, SEEDS, there)
            rate = best_rate(OWN, r, swept(there, task, OWN.name, r))
            if rate is not None:
                found += [JOINT.cell(task, "test", r, rate, seed) for seed in SEEDS]
    return found


def finals(there: Sequence[Row], task: str, entry: Entry, r: int) -> dict[str, Row]:
    """Test rows by seed, at the rate that is best on own bases."""
    rate = best_rate(OWN, r, swept(there, task, OWN.name, r))
    return {row["seed"]: row for row in rows_of(there, task, entry.name, r, "test") if float(row["lr"]) == rate}


def lines(there: Sequence[Row]) -> Iterator[list[str]]:
    """A row a task and rank: both losses and scores with deviations over seeds, the paired difference with its 95%
    interval, and what the joint basis keeps of the task's first step."""
    for task in BY_SCORE:
        for r in sorted({int(row["r"]) for row in there}):
            own, joint = (finals(there, task, entry, r) for entry in (OWN, JOINT))
            seeds = sorted(own.keys() & joint.keys())
            if not seeds:
                continue
            pairs = [float(joint[seed]["loss"]) - float(own[seed]["loss"]) for seed in seeds]
            losses = [_spread([float(found[seed]["loss"]) for seed in seeds], ".4f") for found in (own, joint)]
            scores = [_spread([float(found[seed]["score"]) for seed in seeds], ".1%") for found in (own, joint)]
            kept = statistics.fmean(float(joint[seed]["energy"]) for seed in seeds)
            difference = f"{statistics.fmean(pairs):+.4f} ± {half_width(pairs):.4f}"
            yield [
                task.removesuffix(" by score"), str(r), str(len(seeds)), *losses, difference, *scores, f"{kept:.0%}"
            ]  # fmt: skip


def _spread(values: Sequence[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form}}"


def main() -> None:
    """Run what is missing, and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--task", nargs="+", choices=SHARING, default=list(SHARING))
    runner.arguments(parser)
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    parser.set_defaults(rows=FILE)
    options = parser.parse_args()
    use_dtype(options.dtype)
    if not options.table:
        tasks = [f"{name} by score" for name in options.task]
        runner.run_all(lambda there: wanted(options.r, there, tasks), options, Console(width=140))
    title = "Four tasks: adapters on one basis against each on its own (± deviation; difference: 95%)"
    show(title, HEAD, lines(rows.read(options.output / FILE)))


if __name__ == "__main__":
    main()
