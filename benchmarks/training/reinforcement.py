"""GRPO with few trained numbers: exact answers before and after, by rank, against LoRA; and bytes to a sampler a step.

    python -m benchmarks.training.reinforcement [--entry lora-sb-8 ...] [--seeds 3] [--work runs/rl]
    python -m benchmarks.training.reinforcement --table

SmolLM2-135M learns chain_sum from examples for a moment, the adapter is merged, and from there every entry trains by
`lorasb finetune --rl exact` with the same prompts, steps and seeds. Rates are chosen by the score on another seed:
three around the entry's own, a factor of four apart, and outward for as long as the best is the last one; the other
starts take the rate of the first. Rows go to benchmarks/results/rl.csv as runs finish, and what is there is not run
again. A sampler in another process needs what was trained after each step: R alone, or LoRA's A and B.
"""

from __future__ import annotations

import argparse
import csv
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

from rich.console import Console
from rich.table import Table

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.common.timing import commit, machine_name
from benchmarks.methods.runner import RESULTS

FILE = "rl.csv"
TASK = "chain_sum"
SWEEP_SEED = 100
FARTHEST = 3  # from the entry's rate, in powers of four
STEPS, BATCH, GENERATIONS, HELD_OUT = 40, 16, 8, 200
LONGEST = 5  # tokens of a completion, at most: a sign, three digits and the end
COLUMNS = (
    "entry", "lr", "seed", "before", "after", "first_reward", "last_reward", "trained", "bytes_a_step", "seconds",
    "version", "machine", "date",
)  # fmt: skip
HEAD = ("entry", "trained", "bytes a step", "rate", "seeds", "before", "after", "reward, first", "last", "seconds")


@dataclass(frozen=True)
class Entry:
    """What trains, and the middle of its rates."""

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

    def at(self, power: int) -> float:
        """The rate times four to a power, to three digits."""
        return float(f"{self.rate * 4.0**power:.3g}")


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
    """The model that all begin from: a short run from examples, merged; made once."""
    base = work / "base"
    if not (base / "config.json").is_file():
        options = ["--train-examples", "320", "--r", "64", "--lr", "2e-3", "--eval-examples", "20", "--seed", "7"]
        _lorasb("finetune", "--task", TASK, *options, "--output", work / "examples")
        _merge(work / "examples" / "adapter", base)
    return base


def _merge(adapter: Path, target: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorasb.recipes.bundled_model import EMBEDDED, resolve_model

    source = resolve_model(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    merged.to(torch.bfloat16).save_pretrained(target)


def run(entry: Entry, lr: float, seed: int, work: Path) -> dict[str, Any]:
    """One run, by the command."""
    output = work / f"{entry.method}-{entry.r}-{entry.start}-{lr:g}-{seed}"
    prompts = STEPS * BATCH // GENERATIONS
    given = {
        "--model": started(work), "--task": TASK, "--train-examples": prompts, "--eval-examples": HELD_OUT,
        "--rl": "exact", "--generations": GENERATIONS, "--batch-size": BATCH, "--max-new-tokens": LONGEST,
        "--rl-start": entry.start, "--method": entry.method, "--r": entry.r, "--lr": lr, "--seed": seed,
        "--save-steps": 1000, "--output": output,
    }  # fmt: skip
    began = time.perf_counter()
    _lorasb("finetune", *(part for pair in given.items() for part in pair))
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    rewards, trained = summary["rewards"], summary["trainable_params"]
    return {
        "entry": entry.name,
        "lr": lr,
        "seed": seed,
        "before": summary["eval_accuracy_before"],
        "after": summary["eval_accuracy_after"],
        "first_reward": round(statistics.fmean(rewards[:5]), 4),
        "last_reward": round(statistics.fmean(rewards[-5:]), 4),
        "trained": trained,
        "bytes_a_step": 2 * trained,  # in bf16, as a sampler has its weights
        "seconds": round(time.perf_counter() - began, 1),
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
        yield from ((entry, lr, SWEEP_SEED) for lr in rates_to_try(entry, swept(rows, entry)))
    for seed in range(seeds):
        for entry in entries:
            rate = best_rate(rows, entry)
            if rate is not None and (entry.name, rate, seed) not in there:
                yield entry, rate, seed


def swept(rows: Sequence[Row], entry: Entry) -> dict[float, tuple[float, float]]:
    """By rate, the score and the last reward of the sweep."""
    mine = (row for row in rows if row["entry"] == entry.name and int(row["seed"]) == SWEEP_SEED)
    return {float(row["lr"]): (float(row["after"]), float(row["last_reward"])) for row in mine}


def rates_to_try(entry: Entry, tried: dict[float, tuple[float, float]]) -> list[float]:
    """The three around the entry's own, then the next beyond a best one that is at an end; none when it is not."""
    first = [entry.at(power) for power in (0, -1, 1) if entry.at(power) not in tried]
    if first:
        return first
    powers = [power for power in range(-FARTHEST, FARTHEST + 1) if entry.at(power) in tried]
    best = max(powers, key=lambda power: tried[entry.at(power)])
    beyond = best - 1 if best == powers[0] else best + 1 if best == powers[-1] else None
    return [] if beyond is None or abs(beyond) > FARTHEST else [entry.at(beyond)]


def best_rate(rows: Sequence[Row], entry: Entry) -> float | None:
    """The rate of the best score of the sweep, the last reward among equals; None before all were tried."""
    entry = entry.rated_by
    tried = swept(rows, entry)
    return None if rates_to_try(entry, tried) else max(tried, key=lambda lr: tried[lr])


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A row an entry that has seeds."""
    for entry in ENTRIES.values():
        rate = best_rate(rows, entry)
        mine = [r for r in rows if r["entry"] == entry.name and float(r["lr"]) == rate and int(r["seed"]) < SWEEP_SEED]
        if mine:
            first, size = mine[0], int(mine[0]["bytes_a_step"])
            means = [_mean(mine, name, form) for name, form in (("before", ".1%"), ("after", ".1%"))]
            means += [_mean(mine, name, ".3f") for name in ("first_reward", "last_reward")]
            yield [
                entry.name, f"{int(first['trained']):,}", f"{size / 1e3:,.1f} KB", f"{rate:g}", str(len(mine)), *means,
                _mean(mine, "seconds", ".0f"),
            ]  # fmt: skip


def _mean(rows: Sequence[Row], column: str, form: str) -> str:
    values = [float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


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
        new = not path.is_file()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
    view = Table(title=f"GRPO on {TASK}, {STEPS} steps of {BATCH} completions (mean ± deviation over seeds)")
    for column in HEAD:
        view.add_column(column, justify="left" if column == "entry" else "right")
    for line in lines(read_csv(path)):
        view.add_row(*line)
    Console(width=150).print(view)


if __name__ == "__main__":
    main()
