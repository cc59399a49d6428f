"""One basis for tasks that it was not made from: held-out loss of R on a shared basis, against others.

    python -m benchmarks.research.unseen_tasks [--task spell_backward ...] [--basis own ...] [--r 16 ...] [--seeds 1]
        [--factor 1 ...] [--data-dir DATA]
    python -m benchmarks.research.unseen_tasks --table

Bases are made from the first steps of 1 to 16 families of reasoning-gym, drawn once; tasks are other families, and
ARC-Easy from DATA. Every run takes the automatic rate (measured on 32 samples, refined by two trials), times --factor.
LoRA, which has no such rule, takes the best rate of trials of 12 steps. Rows go to results/unseen-tasks.csv
as runs finish, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import lorasb
from benchmarks.common.csv_files import Row, read_csv
from benchmarks.common.tables import show
from benchmarks.common.timing import commit, dtype_name, machine_name, measured_dtype, use_dtype
from benchmarks.research.methods.problems import LINEARS, MAX_LENGTH
from benchmarks.research.methods.rows import append
from benchmarks.research.methods.run import WARMUP, rate_share, train_step
from benchmarks.research.methods.runner import RESULTS
from lorasb.app.adapter import initialize_basis
from lorasb.app.data import Example, read_jsonl
from lorasb.app.prepare import contiguous_head, demo_model
from lorasb.app.tokenize import Collator, encode
from lorasb.init.auto_rate import warmup_steps
from lorasb.init.pipeline import rate_of_initialized
from lorasb.init.task import InitOptions
from lorasb.layers.lookup import adapted_layers
from lorasb.training.rate_trials import JUDGED, STEPS, find_lr, refine_rate

UNSEEN = (
    "spell_backward",
    "word_sorting",
    "simple_equations",
    "letter_counting",
    "decimal_arithmetic",
    "family_relationships",
    "count_bits",
    "time_intervals",
)
ARC = "arc_easy"
# Families with prompts of at most 160 tokens and answers of at most 40, without those above.
POOL = """
advanced_geometry aiw base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic calendar_arithmetic
chain_sum coin_flip complex_arithmetic countdown cryptarithm decimal_chain_sum dice fraction_simplification gcd
gsm_symbolic isomorphic_strings knights_knaves lcm leg_counting mini_sudoku number_format number_sequence
palindrome_generation power_function prime_factorization products quantum_lock sentence_reordering simple_geometry
syllogism word_ladder word_sequence_reversal
""".split()  # noqa: SIM905  a list would take a line for each
BASIS_FAMILIES = random.Random(0).sample(POOL, 16)
COUNTS = (1, 2, 4, 8, 16)
SHARED = {f"{count} families": count for count in COUNTS}
OWN, RANDOM, LORA_XS, LORA, NONE = "own", "random", "lora-xs", "LoRA r=1", "base"
EIGHT = "8 families"  # the shared basis of the documentation
SMALL = (16, 32)  # ranks of fewer numbers than LoRA r = 1 has
KINDS = (OWN, *SHARED, RANDOM, LORA_XS, LORA, NONE)
RANKS = (8, 16, 32, 64, 128)
TRAIN, HELD_OUT, TRAIN_STEPS, BATCH, SAMPLES = 600, 200, 75, 8, 32
FILE = "unseen-tasks.csv"
KEY = ("task", "basis", "r", "seed", "factor")


def examples(task: str, count: int, seed: int, folder: Path | None) -> list[Example]:
    """Distinct examples of a family, or of ARC-Easy's files."""
    if task == ARC:
        found = read_jsonl((folder or Path("data")) / f"{ARC}.{'train' if seed == 0 else 'test'}.jsonl")
        return random.Random(seed).sample(found, count)
    import reasoning_gym

    rows = reasoning_gym.create_dataset(task, size=4 * count, seed=seed)
    found = list({row["question"]: Example(row["question"], str(row["answer"])) for row in rows}.values())
    return found[:count]


class Task:
    """A task's training batches, samples for a start, and held-out batches; no held-out prompt is trained on."""

    def __init__(self, name: str, seed: int, folder: Path | None, tokenizer: Any, model: Any) -> None:
        held_out = examples(name, HELD_OUT, 10_000_000, folder)
        known = {example.prompt for example in held_out}
        train = [one for one in examples(name, 2 * TRAIN, 0, folder) if one.prompt not in known][:TRAIN]
        self.collate: Any = Collator(tokenizer.pad_token_id, model)
        self.train, self.held_out = ([encode(one, tokenizer, MAX_LENGTH) for one in part] for part in (train, held_out))
        self.draw = random.Random(seed)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of shuffled epochs, without end."""
        while True:
            rows = self.draw.sample(self.train, len(self.train))
            yield from (self.collate(rows[i : i + BATCH]) for i in range(0, len(rows) - BATCH + 1, BATCH))

    def samples(self) -> list[dict[str, Any]]:
        """As many as an initialization takes."""
        return [self.collate(self.train[i : i + BATCH]) for i in range(0, SAMPLES, BATCH)]

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Mean held-out loss."""
        model.eval()
        parts = [self.collate(self.held_out[i : i + 20]) for i in range(0, len(self.held_out), 20)]
        return statistics.fmean(float(model(**part).loss) for part in parts)


def base() -> tuple[Any, Any]:
    """The tokenizer, and the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=measured_dtype())
    contiguous_head(model)
    return AutoTokenizer.from_pretrained(demo_model()), model


def adapted(kind: str, r: int, task: Task, tokenizer: Any, model: Any) -> tuple[Any, float | None, float | None]:
    """The model with an adapter, the rate that was measured, and what the basis keeps of the task's first step."""
    count = SHARED.get(kind, 0)
    if kind == LORA:
        import peft

        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEARS, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config), None, None
    init: Any = {RANDOM: "random", LORA_XS: "lora-xs-output"}.get(kind, "update")
    patched: Any = lorasb.patch(model, r=r, init=init, target_modules=LINEARS)
    if kind == OWN:
        lr: Any = lorasb.first_step_lr("auto", warmup_steps(WARMUP, TRAIN_STEPS))
        return patched, lorasb.initialize(patched, task.samples(), lr=lr, progress=False).rate, 1.0
    if count:
        write_basis(patched, kind, r, tokenizer)
    share = lorasb.basis_fit(patched, task.samples(), progress=False).share
    name, layers = adapted_layers(patched, None)
    return patched, rate_of_initialized(patched, layers, task.samples(), InitOptions(adapter=name)), share


_bases: dict[tuple[str, int], dict[str, tuple[Tensor, Tensor, Tensor]]] = {}  # (kind, r) -> factors by layer


def write_basis(model: Any, kind: str, r: int, tokenizer: Any) -> None:
    """Give an adapter the basis of some families, which is made once per process."""
    layers = adapted_layers(model, None)[1]
    if (kind, r) not in _bases:
        names = BASIS_FAMILIES[: SHARED[kind]]
        starts = {name: Task(name, 0, None, tokenizer, model.get_base_model()).samples() for name in names}
        initialize_basis(model, starts, progress=False)
        found = {name: (layer.lorasb_B, layer.lorasb_R, layer.lorasb_A) for name, layer in layers.items()}
        _bases[kind, r] = {
            name: tuple(part["default"].detach().clone() for part in three) for name, three in found.items()
        }
    for name, layer in layers.items():
        layer.set_factors("default", *_bases[kind, r][name])


def run(name: str, kind: str, r: int, seed: int, factor: float, folder: Path | None) -> Row:
    """One run's row."""
    torch.manual_seed(seed)
    tokenizer, model = base()
    task = Task(name, seed, folder, tokenizer, model)
    before, share, rate = task.loss(model), None, None
    if kind != NONE:
        model, rate, share = adapted(kind, r, task, tokenizer, model)
        batches, trials = task.batches(), [next(task.batches()) for _ in range(STEPS + JUDGED)]
        found = find_lr(model, trials, 4e-3, progress=False) if rate is None else None
        found = found or refine_rate(model, trials, rate or 0.0, progress=False)
        rate = found.lr * factor
        train(model, batches, rate)
    row: dict[str, Any] = {"task": name, "basis": kind, "r": r, "seed": seed, "factor": factor, "rate": rate}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if kind != NONE else 0
    row |= {"loss": round(task.loss(model), 5), "loss_before": round(before, 5), "share": share, "trained": trained}
    row |= {"version": commit(), "machine": machine_name(dtype_name(measured_dtype())), "date": time.strftime("%F")}
    return {key: shown(value) for key, value in row.items()}


def shown(value: Any) -> str:
    """A value as rows have it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def train(model: Any, batches: Iterator[dict[str, Any]], rate: float) -> None:
    """75 steps of AdamW with warm-up and a linear fall."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt, warmup = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), warmup_steps(WARMUP, TRAIN_STEPS)
    for step in range(TRAIN_STEPS):
        opt.param_groups[0]["lr"] = rate * rate_share(step, TRAIN_STEPS, warmup)
        train_step(model, next(batches), opt, trained, False)


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """The ranks of R that have runs."""
    return sorted({int(row["r"]) for row in rows if row["basis"] not in (LORA, NONE)})


def runs(rows: Sequence[Row], task: str, kind: str, r: int) -> list[Row]:
    """Runs of a task on a basis at the automatic rate; LoRA has one rank, whatever R's."""
    wanted = task, kind, "1" if kind == LORA else str(r), "1"
    return [row for row in rows if tuple(row[key] for key in ("task", "basis", "r", "factor")) == wanted]


def before(rows: Sequence[Row], task: str) -> float:
    """The held-out loss without an adapter, which every run of a task measures first."""
    return statistics.fmean(float(row["loss_before"]) for row in rows if row["task"] == task)


def by_task(rows: Sequence[Row], r: int) -> list[list[str]]:
    """The head and the lines of a rank's table: each task's loss without an adapter, and by basis."""
    tasks = [task for task in (*UNSEEN, ARC) if any(runs(rows, task, kind, r) for kind in KINDS if kind != LORA)]
    kinds = [kind for kind in KINDS if kind != NONE and any(runs(rows, task, kind, r) for task in tasks)]
    body = [[task, f"{before(rows, task):.3f}", *(cell(runs(rows, task, kind, r)) for kind in kinds)] for task in tasks]
    return [["task", "no adapter", *kinds], *body]


def over_own(rows: Sequence[Row]) -> list[list[str]]:
    """The head and the lines of the documentation's table, at ranks of few bytes: each task's losses over `own`'s.

    Last, the share of what LoRA r = 1 gains over the model without an adapter that R on the shared basis gains. Means
    over the seeds that both have.
    """
    columns = [*((EIGHT, r) for r in SMALL), (RANDOM, SMALL[0])]
    head = [f"{kind}, r={r}" for kind, r in columns] + [f"of {LORA}'s gain, r={r}" for r in SMALL]
    out = [["task", *head]]
    for task in (*UNSEEN, ARC):
        ratios = [_ratio(rows, task, (kind, r), (OWN, r)) for kind, r in columns]
        if any(ratios):
            gains = [_ratio(rows, task, (EIGHT, r), (LORA, 1), before(rows, task)) for r in SMALL]
            out.append([task, *(f"{x:.2f}x" if x else "" for x in ratios), *(f"{x:.0%}" if x else "" for x in gains)])
    return out


def _ratio(
    rows: Sequence[Row], task: str, one: tuple[str, int], other: tuple[str, int], start: float = 0.0
) -> float | None:
    """The mean ratio of two bases' losses, or of their gains from a loss `start`, over the seeds that both have."""
    above, below = ({row["seed"]: start - float(row["loss"]) for row in runs(rows, task, *key)} for key in (one, other))
    seeds = above.keys() & below.keys()
    return statistics.fmean(above[seed] / below[seed] for seed in seeds) if seeds else None


def cell(rows: Sequence[Row]) -> str:
    """Mean loss, the share of the first step that the basis keeps, and the seeds if several; empty without runs."""
    if not rows:
        return ""
    loss, kept = statistics.fmean(float(row["loss"]) for row in rows), rows[0]["share"]
    known = [f"{float(kept):.0%}"] if kept not in ("None", "1") else []
    known += [f"{len(rows)} seeds"] if len(rows) > 1 else []
    return f"{loss:.3f}" + (f" ({', '.join(known)})" if known else "")


Cell = tuple[str, str, int, int, float]  # as KEY


def cells(options: argparse.Namespace) -> list[Cell]:
    """The runs that the command line selects, first seeds first."""
    kinds = [(kind, r) for r in options.r for kind in options.basis]
    kinds = [(kind, 1 if kind in (LORA, NONE) else r) for kind, r in kinds]  # which have no other rank
    found = [
        (t, k, r, s, f) for s in range(options.seeds) for t in options.task for k, r in kinds for f in options.factor
    ]
    return list(dict.fromkeys(found))


def is_there(path: Path, cell: Cell) -> bool:
    """Whether the file of results, read again, has a run's row."""
    return list(map(shown, cell)) in [[row[key] for key in KEY] for row in read_csv(path)]


def main() -> None:
    """Run what is missing, or show what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=(*UNSEEN, ARC), default=list(UNSEEN))
    parser.add_argument("--basis", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--r", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--factor", nargs="+", type=float, default=[1.0], help="times the automatic rate")
    parser.add_argument("--data-dir", type=Path, help="folder of arc_easy.*.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    use_dtype(options.dtype)
    torch.set_num_threads(options.threads)
    path, console = options.output / FILE, Console(width=160)
    asked = cells(options)
    for cell in () if options.table else asked:
        if is_there(path, cell):
            continue
        row = run(*cell, options.data_dir)
        if not is_there(path, cell):  # another process may have run it since
            append(path, row, list(row))
        console.print(" ".join(f"{key}={row[key]}" for key in (*KEY, "rate", "loss", "loss_before", "share")))
    found = read_csv(path)
    for r in ranks_of(found):
        head, *body = by_task(found, r)
        show(f"r = {r}: held-out loss (share of the task's first step that the basis keeps)", head, body, width=160)
    head, *body = over_own(found)
    show("loss over that on the task's own basis", head, body, width=160)
    missing = sum(not is_there(path, cell) for cell in asked)
    console.print(f"missing: {missing} of the {len(asked)} runs that the options select")


if __name__ == "__main__":
    main()
