"""GRPO with few trained parameters: scores before and after by rank, against LoRA, and bytes per step to a sampler.

    python -m benchmarks.research.reinforcement [--entry lora-sb-8 ...] [--seeds 3] [--work runs/rl]
    python -m benchmarks.research.reinforcement --table

SmolLM2-135M learns sums from 640 examples, and the adapter is merged; from there `lorasb finetune --rl exact` trains
every entry with the same prompts, steps and seeds. Two scores are measured on 500 held-out sums: the mean probability
of the right answer, which GRPO maximizes, and the share of right greedy answers. Rates are chosen by the former, on
another seed: three around the entry's own, a factor of four apart, then outward while the best is the outermost one;
the other starts use the rate of the first start. Runs add their rows to results/rl.csv, and existing rows are not run
again: several processes can share the work, each with its own entries. After each step, a sampler in another process
needs what was trained: only R, or LoRA's A and B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.common.tables import show
from benchmarks.common.timing import commit, machine_name
from benchmarks.research import sums
from benchmarks.research.methods.grid import Judged, Rates
from benchmarks.research.methods.rows import append
from benchmarks.research.methods.runner import RESULTS

FILE = "rl.csv"
SWEEP_SEED = 100
FARTHEST = 3  # from the entry's rate, in powers of four
STEPS, BATCH, GENERATIONS = 30, 32, 8
PROMPTS = STEPS * BATCH // GENERATIONS
LONGEST = 5  # tokens of a completion, at most: a space, three digits and the end
COLUMNS = (
    "entry", "lr", "seed", "chance_before", "chance", "greedy_before", "greedy", "trained", "bytes_a_step",
    "step_seconds", "version", "machine", "date",
)  # fmt: skip
HEAD = "entry", "trained", "bytes per step", "rate", "seeds", "chance", "gained", "greedy", "gained", "seconds per step"


@dataclass(frozen=True)
class Entry:
    """A method with its rank, start and the middle of its rates."""

    method: str
    r: int
    rate: float
    start: str = "examples"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.r}" + ("" if self.start == "examples" else f", {self.start}")

    @property
    def rated_by(self) -> Entry:
        """The entry whose sweep its rate comes from: the same one with the first start."""
        return replace(self, start="examples")

    @property
    def rates(self) -> Rates:
        """The rate times powers of four, to three digits."""
        powers = range(-FARTHEST, FARTHEST + 1)
        return Rates(tuple(float(f"{self.rate * 4.0**power:.3g}") for power in powers), FARTHEST - 1)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("lora-sb", 8, 6.25e-4),
        Entry("lora", 32, 2.5e-4),
        Entry("lora-sb", 64, 1e-4),
        Entry("lora-sb", 2, 2.5e-3),
        Entry("lora", 1, 5e-4),
        Entry("lora-sb", 8, 6.25e-4, "zero"),
        Entry("lora-sb", 8, 6.25e-4, "rewards"),
    )
}


def started(work: Path) -> Path:
    """Return the common starting model, made once: a short run on examples, merged."""
    base = work / "base"
    if not (base / "config.json").is_file():
        learned = sums.problems(work, PROMPTS)["learn"]
        _lorasb("finetune", "--data", learned, *sums.LEARNING, "--output", work / "examples")
        sums.merge(work / "examples" / "adapter", base)
    return base


def known_at_first(work: Path) -> list[float]:
    """Chance and greedy score of the common starting model on the held-out sums; measured once."""
    file = work / "base" / "known.json"
    if not file.is_file():
        found = sums.known(*sums.loaded(started(work)), sums.problems(work, PROMPTS)["held_out"])
        file.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def run(entry: Entry, lr: float, seed: int, work: Path) -> dict[str, Any]:
    """Run `lorasb finetune` once."""
    output, files = work / f"{entry.method}-{entry.r}-{entry.start}-{lr:g}-{seed}", sums.problems(work, PROMPTS)
    given = {
        "--model": started(work), "--data": files["prompts"], "--eval-data": files["held_out"], "--eval-examples": 8,
        "--rl": "exact", "--generations": GENERATIONS, "--batch-size": BATCH, "--max-new-tokens": LONGEST,
        "--rl-start": entry.start, "--method": entry.method, "--r": entry.r, "--lr": lr, "--seed": seed,
        "--save-steps": 1000, "--output": output,
    }  # fmt: skip
    _lorasb("finetune", *(part for pair in given.items() for part in pair))
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    before = known_at_first(work)
    after = sums.known(*sums.loaded(started(work), output / "adapter"), files["held_out"])
    return {
        "entry": entry.name,
        "lr": lr,
        "seed": seed,
        "chance_before": round(before[0], 4),
        "chance": round(after[0], 4),
        "greedy_before": before[1],
        "greedy": after[1],
        "trained": summary["trainable_params"],
        "bytes_a_step": 2 * summary["trainable_params"],  # in bf16, as a sampler has its weights
        "step_seconds": round(summary["train_seconds"] / summary["train_steps"], 2),
        "version": commit(),
        "machine": machine_name(summary["dtype"]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lorasb(*arguments: Any) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "lorasb", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def wanted(entries: Sequence[Entry], seeds: int, rows: Sequence[Row]) -> Iterator[tuple[Entry, float, int]]:
    """The next runs: sweeps, then seeds at the best rates."""
    there = {(row["entry"], float(row["lr"]), int(row["seed"])) for row in rows}
    for entry in dict.fromkeys(entry.rated_by for entry in entries):
        yield from ((entry, lr, SWEEP_SEED) for lr in entry.rates.next(swept(rows, entry)))
    for seed in range(seeds):
        for entry in entries:
            rate = best_rate(rows, entry)
            if rate is not None and (entry.name, rate, seed) not in there:
                yield entry, rate, seed


def swept(rows: Sequence[Row], entry: Entry) -> Judged:
    """By rate, the mean probability of the right answer after the sweep's run, negated."""
    mine = (row for row in rows if row["entry"] == entry.name and int(row["seed"]) == SWEEP_SEED)
    return {float(row["lr"]): (-float(row["chance"]),) for row in mine}


def best_rate(rows: Sequence[Row], entry: Entry) -> float | None:
    """The best rate of the sweep; None before all were tried."""
    return entry.rated_by.rates.found(swept(rows, entry.rated_by))


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield a row per entry that has seeds."""
    for entry in ENTRIES.values():
        rate = best_rate(rows, entry)
        mine = [r for r in rows if r["entry"] == entry.name and float(r["lr"]) == rate and int(r["seed"]) < SWEEP_SEED]
        if mine:
            first, size = mine[0], int(mine[0]["bytes_a_step"])
            means = [part for name in ("chance", "greedy") for part in (_mean(mine, name), _gain(mine, name))]
            yield [
                entry.name, f"{int(first['trained']):,}", f"{size / 1e3:,.1f} KB", f"{rate:g}", str(len(mine)), *means,
                _seconds(mine),
            ]  # fmt: skip


def _seconds(rows: Sequence[Row]) -> str:
    """Return the median over undisturbed runs, which have a time."""
    found = [float(row["step_seconds"]) for row in rows if row["step_seconds"]]
    return f"{statistics.median(found):.1f}" if found else "-"


def _mean(rows: Sequence[Row], column: str) -> str:
    return f"{statistics.fmean(float(row[column]) for row in rows):.1%}"


def _gain(rows: Sequence[Row], column: str) -> str:
    """Points won since before, with the deviation over seeds."""
    gains = [100 * (float(row[column]) - float(row[f"{column}_before"])) for row in rows]
    spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.1f}{spread}"


def title(rows: Sequence[Row]) -> str:
    """Return the table's title, with the scores of the common starting model."""
    before = (
        f"; before, chance {_mean(rows, 'chance_before')} and greedy {_mean(rows, 'greedy_before')}" if rows else ""
    )
    return f"GRPO on sums, {STEPS} steps of {BATCH} completions{before} (points gained, ± deviation over seeds)"


def main() -> None:
    """Run what is missing, and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/rl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    path, chosen = options.output / FILE, [ENTRIES[name] for name in options.entry]
    while not options.table and (cell := next(wanted(chosen, options.seeds, read_csv(path)), None)):
        row = run(*cell, options.work)
        append(path, row, COLUMNS)
        print(row, flush=True)
    found = read_csv(path)
    show(title(found), HEAD, lines(found))


if __name__ == "__main__":
    main()
