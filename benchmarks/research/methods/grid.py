"""What is compared: tasks, methods, learning rates and seeds, fixed before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SEEDS = (0, 1, 2)
SWEEP_SEED = 0
WARMUP = 0.1  # share of the steps; then the rate falls linearly to zero


Judged = Mapping[float, tuple[float, ...]]  # by learning rate, the values to minimize


@dataclass(frozen=True)
class Rates:
    """Learning rates of a sweep: three of a ladder, then outward while the best is the outermost one tried.

    Below and above a method's best rate, the next rate has been tried too, unless the ladder ends there. On a task,
    the ladders of all methods have the same spacing.
    """

    ladder: tuple[float, ...]
    first: int  # where on the ladder the three begin

    @property
    def start(self) -> tuple[float, ...]:
        return self.ladder[self.first : self.first + 3]

    def best(self, tried: Judged) -> float:
        """Return the rate of the ladder with the lowest values; diverged runs come last."""
        return min(
            (lr for lr in self.ladder if lr in tried),
            key=lambda lr: (not all(map(math.isfinite, tried[lr])), tried[lr]),
        )

    def found(self, tried: Judged) -> float | None:
        """Return the best rate; None before all were tried."""
        return None if self.next(tried) else self.best(tried)

    def next(self, tried: Judged) -> tuple[float, ...]:
        """Return the rates to try next, given the results by rate; empty once the best is found."""
        if missing := tuple(lr for lr in self.start if lr not in tried):
            return missing
        at = self.ladder.index(self.best(tried))
        around = self.ladder[max(0, at - 1) : at + 2]
        return tuple(lr for lr in around if lr not in tried)


@dataclass(frozen=True)
class Task:
    """A data set, a model and what a run costs.

    Attributes:
        metric, higher_is_better: the score of the test split, and its direction.
        examples, steps, batch: training examples, training steps and batch size.
        validation, test: number of examples in these splits.
        rank: of LoRA and its relatives.
        ranks: of LoRA-XS and LoRA-SB, the largest last; some tasks have only one.
        rates: by family of methods; all start with the same number and extend it by the same rule (`Rates`).
        head_lr: rate of a head that every method trains from a random start.
        by_score: whether the sweep uses the score, because the loss would mislead: full fine-tuning's best
            Matthews correlation comes after its cross-entropy has begun to rise.
        longest: examples of more tokens are left out of all splits: a batch costs as much as its longest example.
        targets: a regular expression for the adapted modules, if it differs from the problem's.
    """

    name: str
    metric: str
    higher_is_better: bool
    examples: int
    steps: int
    batch: int
    validation: int
    test: int
    rank: int
    ranks: tuple[int, ...]
    rates: Mapping[str, Rates]
    head_lr: float | None = None
    by_score: bool = False
    data: str | None = None  # prefix of files in the data folder; generated where there is none
    longest: int | None = None
    targets: str | None = None

    @property
    def model(self) -> str:
        """Which model it tunes, for tables and pictures."""
        return "MiniLM" if self.head_lr else "SmolLM2-135M"


FULL, LOW, CORE = "full", "lora", "core"  # families that share learning rates
DOUBLING = tuple(6.25e-5 * 2**i for i in range(10))  # 6.25e-5 to 3.2e-2
LM_RATES = {
    FULL: Rates((1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4), 2),
    LOW: Rates(DOUBLING, 4),
    CORE: Rates(DOUBLING, 3),
}
DECADES = (1e-5, 3e-5, 5e-5, 1e-4, 3e-4, 5e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2, 5e-2, 1e-1)
COLA_RATES = {FULL: Rates(DECADES, 1), LOW: Rates(DECADES, 4), CORE: Rates(DECADES, 6)}
TASKS = {
    task.name: task
    for task in (
        Task("chain_sum", "exact match", True, 1200, 75, 16, 100, 200, 32, (16, 64, 96), LM_RATES),
        Task("word_sequence_reversal", "exact match", True, 1200, 75, 16, 100, 200, 32, (64, 96), LM_RATES),
        Task("gsm8k", "held-out loss", False, 192, 24, 8, 48, 96, 32, (96,), LM_RATES, data="gsm8k", longest=192),
        Task(
            "cola",
            "Matthews correlation",
            True,
            7250,
            900,
            32,
            600,
            1301,
            8,
            (8, 16, 24),
            COLA_RATES,
            head_lr=1e-3,
            by_score=True,
            data="cola",
        ),
    )
}


SIZES: dict[str, dict[str, Any]] = {
    "chain_sum": {"batch": 8, "validation": 400, "test": 1000},
    "word_sequence_reversal": {"batch": 8, "validation": 400, "test": 1000},
    "gsm8k": {"examples": 600, "steps": 75, "validation": 200, "test": 1000, "longest": 240},
    # the modules that the authors adapt: at r = 8 in RoBERTa-large they are the paper's 6,144 numbers
    "cola": {"steps": 450, "targets": r".*(self\.(query|value)|output\.dense)"},
}
LENGTHS = (300, 1200)  # steps, each on different examples
LONGER: dict[str, tuple[str, dict[str, Any]]] = {  # the task that each is a longer run of
    f"{name}, {steps} steps": (name, {"steps": steps, "examples": steps * SIZES[name]["batch"]})
    for name in ("chain_sum", "word_sequence_reversal")
    for steps in LENGTHS
}
LONGER["cola, 30 epochs"] = ("cola", {"steps": 30 * (TASKS["cola"].examples // TASKS["cola"].batch)})


def _by_loss(name: str, **sizes: Any) -> Task:
    judged = {"metric": "held-out loss", "higher_is_better": False, "by_score": False}
    return replace(TASKS[name], **{**judged, **SIZES[name], **sizes})


BY_LOSS = {f"{name} by loss": _by_loss(name) for name in SIZES}
BY_LOSS |= {f"{longer} by loss": _by_loss(name, **sizes) for longer, (name, sizes) in LONGER.items()}


# Tasks of one model that may share a basis, by the score of generated answers and by loss.
SHARING = ("word_sequence_reversal", "chain_sum", "leg_counting", "gcd")
BY_SCORE = {
    f"{name} by score": Task(name, "exact match", True, 600, 75, 8, 200, 200, 32, (64,), LM_RATES) for name in SHARING
}


def task_named(name: str) -> Task:
    """Return a task of the comparison, the same by loss on a thousand examples ("cola by loss"), or one "by score"."""
    return {**TASKS, **BY_LOSS, **BY_SCORE}[name]


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning, and options of `benchmarks.research.methods.adapters.put_in`."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)


SGD = "LoRA-SB (sgd)"  # factors from the mean gradient instead of its sign
WHOLE = "LoRA-SB (whole step)"  # R starts with all of the first step, as the paper's text has it
METHODS = {
    method.name: method
    for method in (
        Method("full", FULL),
        Method("LoRA", LOW),
        Method("rsLoRA", LOW, {"use_rslora": True}),
        Method("PiSSA", LOW, {"init_lora_weights": "pissa_niter_16"}),
        Method("DoRA", LOW, {"use_dora": True}),
        Method("LoRA-GA", LOW, {"init_lora_weights": "lora_ga"}),
        Method("LoRA-Pro", LOW),
        Method("LoRA-XS", CORE, {"init": "lora-xs-output"}),  # Σ in B; benchmarks.research.paired has its authors' too
        Method("LoRA-SB", CORE),
        Method(SGD, CORE, {"update": "sgd"}),
        Method(WHOLE, CORE, {"longest_start": None}),
    )
}

KEY = ("task", "split", "method", "r", "lr", "seed", "variant")  # what tells one run from another


@dataclass(frozen=True)
class Cell:
    """One run. `variant` names an ablation and changes what its options say; the comparison itself has none."""

    task: str
    split: str  # "validation" for the sweep, "test" for the seeds at the best rate
    method: str
    r: int
    lr: float
    seed: int
    variant: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What tells one run from another in a file of rows."""
        return tuple(str(getattr(self, name)) for name in KEY)

    def described(self) -> dict[str, Any]:
        return {**asdict(self), "options": dict(self.options)}


def ranks(task: Task, method: Method) -> tuple[int, ...]:
    """The ranks at which a method is tried; 0 where it has none."""
    if method.family == FULL:
        return (0,)
    return task.ranks[::-1] if method.family == CORE else (task.rank,)


def order(names: Sequence[str]) -> list[Method]:
    """Return the named methods, LoRA-SB and its baselines first."""
    first = ("LoRA-SB", "LoRA-XS", "LoRA", SGD, "full", WHOLE)
    return sorted((METHODS[name] for name in names), key=lambda m: first.index(m.name) if m.name in first else 9)


def sweep(task: Task, method: Method, rows: Sequence[dict[str, str]]) -> Iterator[Cell]:
    """The learning rates that are to be tried next, by one seed on the validation split."""
    for r in ranks(task, method):
        for lr in task.rates[method.family].next(judged(task, method, r, rows)):
            yield Cell(task.name, "validation", method.name, r, lr, SWEEP_SEED)


def finals(task: Task, method: Method, rows: Sequence[dict[str, str]]) -> Iterator[Cell]:
    """All seeds at the best rate, for every rank whose sweep is complete."""
    for r in ranks(task, method):
        rate = best_rate(task, method, r, rows)
        if rate is not None:
            yield from (Cell(task.name, "test", method.name, r, rate, seed) for seed in SEEDS)


def swept(
    task: Task, method: Method, r: int, rows: Sequence[dict[str, str]], measure: str = "loss"
) -> dict[float, float]:
    """Validation loss (or score) by learning rate."""
    return {
        float(row["lr"]): float(row[measure])
        for row in rows
        if (row["task"], row["split"], row["method"], row["r"], row["variant"])
        == (task.name, "validation", method.name, str(r), "")
        and row["seed"] == str(SWEEP_SEED)
    }


def judged(task: Task, method: Method, r: int, rows: Sequence[dict[str, str]]) -> Judged:
    """Return what a sweep minimizes: the loss, which separates rates sooner than a score on a few hundred examples
    does; or the (negated) score, with the loss as tie-breaker."""
    losses = swept(task, method, r, rows)
    if not task.by_score:
        return {lr: (loss,) for lr, loss in losses.items()}
    scores = swept(task, method, r, rows, "score")
    return {lr: (-scores[lr] if task.higher_is_better else scores[lr], loss) for lr, loss in losses.items()}


def best_rate(task: Task, method: Method, r: int, rows: Sequence[dict[str, str]]) -> float | None:
    """The rate of the best validation run, or None before all were tried."""
    return task.rates[method.family].found(judged(task, method, r, rows))
