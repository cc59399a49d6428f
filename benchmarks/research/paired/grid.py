"""What is compared in pairs: tasks judged by loss on a thousand examples, entries, ranks, rates and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common.csv_files import Row
from benchmarks.research.methods.grid import LONGER, Cell, Judged, Rates

PLAIN = "sign"  # the default start
FIXED, FOUND = "sign, 2e-3", "sign, rate found"  # a constant rate, and the one that `lorasb.find_lr` finds from it
MEASURED = "sign, rate measured"  # lr="auto", the default
PER_SAMPLE = {"update": "per-sample", "longest_start": 0.0}
# other settings in which the automatic rate is compared with a sweep
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"four_bits": True},
    "batches of 32": {"batch": 32},
    "300 steps": {"steps": 300},
}
UNTUNED = ", 2e-4"  # after a LoRA's name: at the rate that TRL's guide to adapters has
LORA = "LoRA r=32"  # what everybody uses; ten times the parameters of r = 64 here
ROWS = "paired.csv"  # next to the other results
SEEDS = tuple(range(8))
SWEEP_SEED = 100  # rates are chosen on another seed and another split than what is compared
RANKS = (2, 4, 8, 16, 64)
FARTHEST = 6  # from the rule's rate, in powers of two
CHOOSING, HELD_BACK = ("chain_sum", "gsm8k"), ("word_sequence_reversal", "cola")  # recipes were chosen on the first
TASKS = (*CHOOSING, *HELD_BACK)


@dataclass(frozen=True)
class Entry:
    """A start, an optimizer and the rates that are tried.

    Attributes:
        name: in rows and tables.
        method: the entry of `benchmarks.research.methods.grid.METHODS` that it modifies.
        options: for `benchmarks.research.methods.adapters`.
        rate: peak rate at r = 16; the ladder multiplies it by powers of two.
        falls: the rate at rank r is `rate`·(16/r)^falls. The spectral norm of an AdamW step is r times the rate if its
            signs agree, and 2√r times if not; that of a Muon step is the rate. 1.5 was found on chain_sum.
        only: its fixed rank; None for all ranks.
        swept: whether the best rate of a sweep is used, or the rule's rate.
        setting: that of `SETTINGS` in which it runs; empty for the task's own.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 4e-3
    falls: float = 1.5
    only: int | None = None
    swept: bool = True
    setting: str = ""

    def rank(self, r: int) -> int:
        """The rank that it is run at, in a comparison at rank r."""
        return self.only or r

    def rates(self, r: int) -> Rates:
        """Return three rates around the rule's; more if the best is at an end."""
        return Rates(tuple(self.at(r, power) for power in range(-FARTHEST, FARTHEST + 1)), FARTHEST - 1)

    def at(self, r: int, power: int) -> float:
        """The rule's rate at rank r, times two to a power, to three digits."""
        return float(f"{self.rate * (16 / r) ** self.falls * 2.0**power:.3g}")

    def cell(self, task: str, split: str, r: int, lr: float, seed: int) -> Cell:
        """A run."""
        return Cell(task, split, self.method, r, lr, seed, self.name, tuple(sorted(self.options.items())))


def _of_peft(name: str, rank: int, rate: float, **options: Any) -> Entry:
    """An adapter that PEFT ships; if not a LoRA, at its documented defaults but for the options."""
    return Entry(name, "LoRA", options, rate, 0.0, only=rank)


def _in_setting(entry: Entry, setting: str) -> Entry:
    """An entry in another setting than the task's."""
    name, options = f"{entry.name}, {setting}", {**entry.options, **SETTINGS[setting]}
    return replace(entry, name=name, options=options, setting=setting)


def entries() -> dict[str, Entry]:
    """By name; the first is the default start, at the best rate of a sweep."""
    plain = Entry(PLAIN, "LoRA-SB")
    measured = Entry(MEASURED, "LoRA-SB", {"measured": True}, rate=2e-3, falls=0.0, swept=False)
    found = (
        plain,
        Entry(FIXED, "LoRA-SB", rate=2e-3, falls=0.0, swept=False),
        Entry(FOUND, "LoRA-SB", {"trials": True}, rate=2e-3, falls=0.0, swept=False),
        measured,
        Entry("random", "LoRA-SB", {"init": "random"}),
        Entry("LoRA-XS", "LoRA-SB", {"init": "lora-xs", "alpha_is_rank": True}, rate=2e-3),
        Entry("LoRA-XS, output", "LoRA-SB", {"init": "lora-xs-output", "alpha_is_rank": True}, rate=2e-3),
        Entry("sign, R = 0", "LoRA-SB", {"longest_start": 0.0}),
        Entry("per-sample", "LoRA-SB", PER_SAMPLE),
        Entry("per-sample, rate measured", "LoRA-SB", {**PER_SAMPLE, "measured": True}, 2e-3, 0.0, swept=False),
        Entry("sgd, rate measured", "LoRA-SB", {"update": "sgd", "measured": True}, 2e-3, 0.0, swept=False),
        Entry("whitened", "LoRA-SB", {"init": "random", "whitened": True}),
        Entry("sign, rotated", "LoRA-SB", {"rotated": True}),
        Entry("sign, later", "LoRA-SB", {"refresh": 0.1, "later_samples": 64}),
        Entry("sign, seeded", "LoRA-SB", {"seeded": True}),
        Entry("sign, SOAP", "LoRA-SB", {"optimizer": "soap"}),
        Entry("by spread", "LoRA-SB", {"init": "random", "by_spread": True}),
        Entry("ranks by energy", "LoRA-SB", {"ranks_by_energy": True}),
        Entry(
            "W, Muon",
            "LoRA-SB",
            {"init": "lora-xs", "alpha_is_rank": True, "unit": True, "optimizer": "muon"},
            rate=2e-2,
            falls=0.0,
        ),
        Entry(LORA, "LoRA", rate=2e-3, falls=0.0, only=32),
        *(Entry(f"LoRA r={r}", "LoRA", rate=4e-3, falls=0.0, only=r) for r in (1, 2, 3, 6)),
        *(Entry(f"LoRA r={r}{UNTUNED}", "LoRA", rate=2e-4, falls=0.0, only=r, swept=False) for r in (1, 32)),
        _of_peft("rsLoRA", 32, 5e-4, peft="LoraConfig", use_rslora=True),
        _of_peft("DoRA", 32, 2e-3, peft="LoraConfig", use_dora=True),
        _of_peft("VeRA", 256, 1.6e-2, peft="VeraConfig", r=256, save_projection=False),
        _of_peft("IA3", 1, 1.6e-2, peft="IA3Config", feedforward_modules=r".*\.down_proj"),
        _of_peft("LoKr", 8, 4e-3, peft="LoKrConfig", r=8, alpha=8),
        _of_peft("TinyLoRA", 2, 8e-3, peft="TinyLoraConfig"),
        _of_peft("PSOFT", 32, 4e-3, peft="PsoftConfig"),
        _of_peft("PSOFT, not orthogonal", 32, 4e-3, peft="PsoftConfig", psoft_orth=False),
        _of_peft("VB-LoRA", 4, 4e-3, peft="VBLoRAConfig", r=4, num_vectors=256, vector_length=64),
        _of_peft("RandLoRA", 32, 4e-3, peft="RandLoraConfig", r=32),
        *(_in_setting(entry, setting) for entry in (plain, measured) for setting in SETTINGS),
    )
    return {entry.name: entry for entry in found}


def rows_of(rows: Sequence[Row], task: str, entry: str, r: int, split: str) -> list[Row]:
    """The runs of an entry at a rank, of all rates and seeds."""
    wanted = task, entry, str(r), split
    return [row for row in rows if (row["task"], row["variant"], row["r"], row["split"]) == wanted]


def sweep_of(task: str) -> str:
    """Return the task that a task's rates are chosen on: for a longer run, the short one."""
    return f"{base} by loss" if (base := LONGER.get(task.removesuffix(" by loss"), ("",))[0]) else task


def swept(rows: Sequence[Row], task: str, entry: str, r: int) -> Judged:
    """Validation loss by rate."""
    found = rows_of(rows, sweep_of(task), entry, r, "validation")
    return {float(row["lr"]): (float(row["loss"]),) for row in found if row["seed"] == str(SWEEP_SEED)}


def best_rate(entry: Entry, r: int, tried: Judged) -> float | None:
    """The rate of the least validation loss, or the only one; None before all were tried."""
    return entry.rates(r).found(tried) if entry.swept else entry.at(r, 0)


def shown_rate(entry: Entry, r: int, rows: Sequence[Row], task: str) -> str:
    """Format the best rate, marked if the ladder ended before the loss rose again; or the rates that runs found."""
    if not entry.swept:
        found = {float(row["found_lr"]) for row in rows_of(rows, task, entry.name, r, "test") if row["found_lr"]}
        low, high = (f"{rate:.2g}" for rate in (min(found, default=entry.at(r, 0)), max(found, default=entry.at(r, 0))))
        return low if low == high else f"{low} to {high}"
    rate = best_rate(entry, r, swept(rows, task, entry.name, r))
    return f"{rate:g}" + (" (last tried)" if rate in (entry.at(r, -FARTHEST), entry.at(r, FARTHEST)) else "")


def wanted(
    tasks: Sequence[str], names: Sequence[str], ranks: Sequence[int], seeds: Sequence[int], rows: Sequence[Row]
) -> list[Cell]:
    """Return the next runs: sweeps, and the seeds of finished sweeps."""
    return [
        cell
        for task in tasks
        for r in ranks
        for name in names
        for cell in cells(f"{task} by loss", entries()[name], entries()[name].rank(r), seeds, rows)
    ]


def cells(task: str, entry: Entry, r: int, seeds: Sequence[int], rows: Sequence[Row]) -> Iterator[Cell]:
    """The rates of an entry's sweep that are to be tried next, or its seeds at the best rate."""
    tried = swept(rows, task, entry.name, r)
    for lr in entry.rates(r).next(tried) if entry.swept else ():
        yield entry.cell(sweep_of(task), "validation", r, lr, SWEEP_SEED)
    rate = best_rate(entry, r, tried)
    if rate is not None:
        yield from (entry.cell(task, "test", r, rate, seed) for seed in seeds)
