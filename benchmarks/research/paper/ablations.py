"""Ablations of LoRA-SB: one change at a time, with the same data, order and schedule.

Runs use `benchmarks.research.methods` (rows in methods.csv, by `variant`): chain_sum on the validation
split, three seeds, r = 64 and peak rate 1e-3 unless a variant overrides them; CoLA is compared with the
test runs of the comparison of methods. Runs with the same seed share data and order, so each loss is
compared with that of the plain run with the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.csv_files import Row
from benchmarks.common.tables import show
from benchmarks.research.methods import rows, runner
from benchmarks.research.methods.grid import SEEDS, SGD, TASKS, WHOLE, Cell, Task
from benchmarks.research.methods.tables import spread
from lorasb.init.initialization import LONGEST_START
from lorasb.utils.plotting import GRAD, INK, MUTED, canvas, save

TASK, R, LR = TASKS["chain_sum"], 64, 1e-3


@dataclass(frozen=True)
class Variant:
    """One configuration of an ablation.

    Attributes:
        label: name in tables and pictures.
        options: for `benchmarks.research.methods.adapters.put_in`; empty for unmodified LoRA-SB.
        seeds: only one for a variant that serves to show that a neighboring rate is better.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    r: int = R
    lr: float = LR
    method: str = "LoRA-SB"
    seeds: tuple[int, ...] = SEEDS
    task: Task = TASK
    split: str = "validation"

    @property
    def name(self) -> str:
        """The variant's name in the rows."""
        return " ".join(f"{key}={value}" for key, value in sorted(self.options.items()))

    def cells(self) -> Iterator[Cell]:
        options = tuple(sorted(self.options.items()))
        yield from (
            Cell(self.task.name, self.split, self.method, self.r, self.lr, s, self.name, options) for s in self.seeds
        )


@dataclass(frozen=True)
class Ablation:
    """A question, and the variants that answer it.

    Attributes:
        file: name of the picture.
        title: says where the paper asks it, if it does.
        pairs: each variant with what it is compared with.
    """

    file: str
    title: str
    pairs: tuple[tuple[Variant, Variant], ...]

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple({variant.label: variant for pair in self.pairs for variant in pair}.values())

    @property
    def task(self) -> Task:
        return self.variants[0].task

    @property
    def size(self) -> str:
        """A description of a run."""
        task, held = self.task, getattr(self.task, self.variants[0].split)
        return f"{task.name}, {task.model}, {task.steps} steps of {task.batch}, {held:,} held-out examples"


def _against(plain: Variant, *others: Variant) -> tuple[tuple[Variant, Variant], ...]:
    return tuple((other, plain) for other in (*others, plain))


PLAIN = Variant("LoRA-SB")
PAPER = Variant("ΔW", method=WHOLE)  # the paper's own start
NOISES = (1e-5, 1e-4, 1e-3, 1e-2)
COUNTS = (1, 5, 25, 50, 100, 200)
STARTS = ((16, 8e-3), (64, 1e-3), (96, 1e-3))  # ranks and rates near the best of the sweeps of sign and gradient
LENGTHS = (0.0, 1.0)
SUBSPACES = {16: (8e-3, 8e-3, 3.2e-2, 8e-3), 64: (2e-3, 1e-3, 4e-3, 5e-4)}  # rank: rates, in _subspaces' order


def _subspaces(r: int, sign: float, gradient: float, weight: float, skewed: float) -> Iterator[tuple[Variant, Variant]]:
    """Orthonormal factors of sign(G), G and W, and LoRA-XS's own, each at the best of the rates tried for it."""
    yield from _against(
        Variant(f"sign(G), r={r}", r=r, lr=sign),
        Variant(f"G, r={r}", r=r, lr=gradient, method=SGD),
        Variant(f"W, B = U Σ (LoRA-XS), r={r}", r=r, lr=skewed, method="LoRA-XS"),
        Variant(f"W, B = U, r={r}", {"flat": True}, r, weight, "LoRA-XS"),
        *(
            Variant(f"W, B = U, r={r}, lr {lr:g}", {"flat": True}, r, lr, "LoRA-XS", SEEDS[:1])
            for lr in (weight / 2, weight * 2)
        ),
    )


def _cola() -> Iterator[tuple[Variant, Variant]]:
    """Yield LoRA and LoRA-SB at their best rates, also with twice the steps."""
    plain = Variant("LoRA-SB", r=24, lr=5e-3, task=TASKS["cola"], split="test")
    lora = replace(plain, label="LoRA", r=8, lr=1e-3, method="LoRA")
    twice = {"steps": 2 * plain.task.steps}
    yield from _against(
        *(replace(of, label=f"{of.label}, {twice['steps']} steps", options=twice) for of in (lora, plain)),
    )
    yield from _against(lora, plain)


def _starts(r: int, lr: float) -> Iterator[tuple[Variant, Variant]]:
    """Longest starts at one rank and rate."""
    yield from _against(
        Variant(f"{LONGEST_START:g} (default), r={r}", r=r, lr=lr),
        *(Variant(f"{length:g}, r={r}", {"longest_start": length}, r, lr) for length in LENGTHS),
        Variant(f"whole, r={r}", r=r, lr=lr, method=WHOLE),
    )


ABLATIONS = {
    "starts": Ablation(
        "table-5",
        "Truncated SVD of ΔW, with noise, or of random weights (Table 5)",
        _against(
            PAPER,
            Variant("Kaiming", {"init": "kaiming"}, method=WHOLE),
            *(Variant(f"ΔW + N(0, {s:.0e}²)", {"noise": s}, method=WHOLE) for s in reversed(NOISES)),
        ),
    ),
    "samples": Ablation(
        "table-6",
        "Samples of the initialization (Table 6)",
        _against(
            replace(PAPER, label="32 (default)"), *(Variant(str(n), {"samples": n}, method=WHOLE) for n in COUNTS)
        ),
    ),
    "orthonormal": Ablation(
        "figure-3",
        "B orthonormal or B = U Σ, R = I (Figure 3)",
        _against(
            replace(PAPER, label="B = U, R = Σ, lr 1e-3"),
            *(
                Variant(f"B = U Σ, R = I, lr {lr:g}", {"skewed": True, "eta": LR / lr}, lr=lr, method=WHOLE)
                for lr in (1e-3, 1e-2, 1e-1)
            ),
        ),
    ),
    "start": Ablation(
        "start",
        "Limit of the start, in AdamW's steps of R",
        tuple(pair for r, lr in STARTS for pair in _starts(r, lr)),
    ),
    "update": Ablation(
        "update",
        "First step of AdamW, sign(G), or of SGD, G",
        tuple(
            pair
            for r, lr in STARTS
            for pair in _against(Variant(f"sign(G), r={r}", r=r, lr=lr), Variant(f"G, r={r}", r=r, lr=lr, method=SGD))
        ),
    ),
    "subspace": Ablation(
        "subspace",
        "Factors of G, sign(G) or W, each at its best rate",
        tuple(pair for r, rates in SUBSPACES.items() for pair in _subspaces(r, *rates)),
    ),
    "again": Ablation(
        "again",
        "A second SVD in the middle of training",
        _against(Variant("one SVD"), Variant("again at 25% of the steps", {"again": 0.25})),
    ),
    "rounding": Ablation(
        "rounding",
        "Correcting 4-bit rounding inside the subspace",
        _against(
            Variant("NF4", {"four_bits": True}),
            Variant("NF4, R corrected", {"four_bits": True, "corrected": True}),
            Variant("bf16"),
        ),
    ),
    "cola": Ablation("cola", "CoLA: twice the steps", tuple(_cola())),
}


def results(variant: Variant, there: Sequence[Row]) -> dict[int, Row]:
    """Rows by seed."""
    keys = {cell.key: cell.seed for cell in variant.cells()}
    return {keys[key]: row for row in there if (key := rows.key(row)) in keys}


def summary(ablation: Ablation, there: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line per variant: loss, exact match, and the loss minus its counterpart's at the same seed."""
    lines = []
    for variant, plain in ablation.pairs:
        mine, theirs = results(variant, there), results(plain, there)
        if mine and mine.keys() & theirs.keys():
            lines.append(_line(variant, plain, mine, theirs))
    return lines


def _line(variant: Variant, plain: Variant, mine: dict[int, Row], theirs: dict[int, Row]) -> dict[str, Any]:
    loss, score = (spread([float(row[name]) for row in mine.values()]) for name in ("loss", "score"))
    over = spread([float(row["loss"]) - float(theirs[s]["loss"]) for s, row in mine.items() if s in theirs] or [0.0])
    return {
        "variant": variant.label,
        "against": plain.label,
        "r": variant.r,
        "lr": variant.lr,
        "seeds": len(mine),
        "loss": loss[0],
        "loss_sd": loss[1],
        "over": over[0],
        "over_sd": over[1],
        "score": score[0],
        "score_sd": score[1],
    }


def head(ablation: Ablation) -> list[str]:
    """Return the table header for the lines of `shown`."""
    return ["", "r", "lr", "seeds", "loss", "difference from the plain run, by seed", ablation.task.metric]


def shown(line: Mapping[str, Any]) -> list[str]:
    """Format a line as table cells, under `head`."""

    def spread_of(name: str, sign: str = "") -> str:
        mean = f"{line[name]:{sign}.3f}"
        return mean if line["seeds"] == 1 else f"{mean} ± {line[f'{name}_sd']:.3f}"

    over = "" if line["variant"] == line["against"] else spread_of("over", "+")
    texts = [line["variant"], str(line["r"]), f"{line['lr']:g}", str(line["seeds"])]
    return [*texts, spread_of("loss"), over, spread_of("score")]


def plot(ablation: Ablation, lines: Sequence[Mapping[str, Any]], there: Sequence[Row], path: Path) -> None:
    """Each variant's mean and standard deviation, and its seeds."""
    figure, axes = canvas()
    by_label = {variant.label: results(variant, there) for variant in ablation.variants}
    measure = "score" if ablation.task.by_score else "loss"
    name = ablation.task.metric if ablation.task.by_score else "loss, nats per token"
    for i, line in enumerate(lines):
        color = GRAD if line["variant"] == line["against"] else INK
        axes.errorbar(line[measure], i, xerr=line[f"{measure}_sd"], fmt="o", color=color, capsize=4, ms=7)
        seeds = [float(row[measure]) for row in by_label[line["variant"]].values()]
        axes.plot(seeds, [i + 0.18] * len(seeds), ".", color=MUTED, ms=6)
    axes.set_yticks(range(len(lines)), [f"{line['variant']}  (n = {line['seeds']})" for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out {name} (mean ± sd; gray: seeds)\n{ablation.size}", fontsize=9)
    if measure == "loss" and max(line["loss"] for line in lines) > 4 * min(line["loss"] for line in lines):
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.25)
    save(figure, axes, ablation.title, path)


def render(name: str, there: Sequence[Row], output: Path) -> list[dict[str, Any]]:
    """Draw the variants that have run, and return their lines."""
    ablation = ABLATIONS[name]
    if lines := summary(ablation, there):
        plot(ablation, lines, there, output / f"{ablation.file}.png")
    return lines


def main(name: str, options: argparse.Namespace) -> None:
    """Run what is missing, print and draw."""
    ablation = ABLATIONS[name]
    cells = sorted((cell for variant in ablation.variants for cell in variant.cells()), key=lambda cell: cell.seed)
    runner.run_all(lambda there: cells, options, Console(width=140))
    if not (lines := render(name, rows.read(options.output / runner.ROWS), options.output)):
        raise SystemExit(f"no run of {name!r} is there yet: give it more --minutes")
    show(f"{ablation.title}; {ablation.size}; mean ± standard deviation over seeds", head(ablation), map(shown, lines))
