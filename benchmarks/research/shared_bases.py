"""Tasks and bases of the study of unseen tasks: families of reasoning-gym, drawn once, files, and A and B from them.

A basis is made once per process, from first steps, or by training a LoRA on a mixture of the families.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorasb
from benchmarks.common.timing import measured_dtype
from benchmarks.research.methods.problems import LINEARS, MAX_LENGTH
from benchmarks.research.methods.run import WARMUP, rate_share, train_step
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
FILES = {"arc_easy": "test", "cola": "dev", "gsm8k": "test"}  # task -> its held-out file
# Families with prompts of at most 160 tokens and answers of at most 40, without those above.
POOL = """
advanced_geometry aiw base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic calendar_arithmetic
chain_sum coin_flip complex_arithmetic countdown cryptarithm decimal_chain_sum dice fraction_simplification gcd
gsm_symbolic isomorphic_strings knights_knaves lcm leg_counting mini_sudoku number_format number_sequence
palindrome_generation power_function prime_factorization products quantum_lock sentence_reordering simple_geometry
syllogism word_ladder word_sequence_reversal
""".split()  # noqa: SIM905  a list would take a line for each
FAMILIES = random.Random(0).sample(POOL, 16)
COUNTS = {"1 family": 1, **{f"{count} families": count for count in (2, 4, 8, 16)}}
EIGHT = "8 families"  # the shared basis of the documentation
PER_SAMPLE, TEXT, TRAINED, RANKS = (f"{EIGHT}{how}" for how in (", per-sample", " and text", ", trained", ", ranks"))
MEAN = f"mean of {EIGHT}"  # mean R of their adapters on the shared basis, without further training
SHARED = (*COUNTS, PER_SAMPLE, TEXT, TRAINED, RANKS)
TRAIN, HELD_OUT, TRAIN_STEPS, BATCH, SAMPLES = 600, 200, 75, 8, 32
MIXTURE_STEPS = 400  # of the LoRA that the trained basis is made from
Batch = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor, Tensor]]  # layer -> B, R and A


def examples(task: str, count: int, seed: int, folder: Path | None) -> list[Example]:
    """Distinct examples of a family, or of a file; seed 0 has those to train on."""
    if task in FILES:
        part = "train" if seed == 0 else FILES[task]
        found = read_jsonl((folder or Path("data")) / f"{task}.{part}.jsonl")
        return [_in_words(one) for one in random.Random(seed).sample(found, count)]
    import reasoning_gym

    rows = reasoning_gym.create_dataset(task, size=4 * count, seed=seed)
    found = list({row["question"]: Example(row["question"], str(row["answer"])) for row in rows}.values())
    return found[:count]


def _in_words(example: Example) -> Example:
    """A labeled sentence of CoLA as a question and an answer; others as they are."""
    if example.label is None:
        return example
    answer = "yes" if example.completion == "1" else "no"
    return Example(f"Is this sentence acceptable English? {example.prompt}", answer)


class Task:
    """A task's training batches, samples for a start, and held-out batches; no held-out prompt is trained on."""

    def __init__(self, name: str, seed: int, folder: Path | None, tokenizer: Any, model: nn.Module) -> None:
        held_out = examples(name, HELD_OUT, 10_000_000, folder)
        known = {example.prompt for example in held_out}
        train = [one for one in examples(name, 2 * TRAIN, 0, folder) if one.prompt not in known][:TRAIN]
        self.collate: Any = Collator(tokenizer.pad_token_id, model)
        self.train, self.held_out = ([encode(one, tokenizer, MAX_LENGTH) for one in part] for part in (train, held_out))
        self.draw = random.Random(seed)

    def batches(self) -> Iterator[Batch]:
        """Batches of shuffled epochs, without end."""
        while True:
            rows = self.draw.sample(self.train, len(self.train))
            yield from (self.collate(rows[i : i + BATCH]) for i in range(0, len(rows) - BATCH + 1, BATCH))

    def samples(self) -> list[Batch]:
        """Return batches for an initialization."""
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


def lora(model: Any, r: int) -> Any:
    """The model with a LoRA on every linear."""
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=LINEARS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def patched(model: Any, kind: str, r: int, init: str = "update") -> Any:
    """Add an adapter with the ranks of a kind of basis."""
    pattern = ranks_by_energy(r) if kind == RANKS else {}
    return lorasb.patch(model, r=r, rank_pattern=pattern, init=init, target_modules=LINEARS)


def on_shared(model: Any, kind: str, r: int) -> Any:
    """Put the model on a shared basis with R = 0, or with the mean of the families' R's (the untrained control)."""
    model = patched(model, kind, r)
    found = mean_adapter(r) if kind == MEAN else shared_factors(kind, r)
    for name, layer in adapted_layers(model, None)[1].items():
        layer.set_factors("default", *found[name])
    return model


def factors_of(model: Any) -> Factors:
    """Copies of the adapter's B, R and A."""

    def copied(parts: nn.ParameterDict) -> Tensor:
        return parts["default"].detach().clone()

    found = adapted_layers(model, None)[1]
    return {name: (copied(one.lorasb_B), copied(one.lorasb_R), copied(one.lorasb_A)) for name, one in found.items()}


@cache
def shared_factors(kind: str, r: int) -> Factors:
    """A shared basis, with R = 0."""
    if kind == TRAINED:
        return trained_factors(r)
    tokenizer, model = base()
    starts = {task: Task(task, 0, None, tokenizer, model).samples() for task in FAMILIES[: COUNTS.get(kind, 8)]}
    if kind == TEXT:
        starts["text"] = own_text(tokenizer, model)
    model = patched(model, kind, r)
    initialize_basis(model, starts, update="per-sample" if kind == PER_SAMPLE else "adamw", progress=False)
    return factors_of(model)


def own_text(tokenizer: Any, model: Any) -> list[Batch]:
    """Batches of text that the model samples from nothing but its first token."""
    first = torch.full((BATCH, 1), tokenizer.bos_token_id)
    torch.manual_seed(0)
    rows = [
        model.generate(first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, max_new_tokens=64)
        for _ in range(0, SAMPLES, BATCH)
    ]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def mixed(tasks: Sequence[Task]) -> Iterator[Batch]:
    """Batches of several tasks in turn."""
    return itertools.chain.from_iterable(zip(*(task.batches() for task in tasks), strict=True))


def trained_factors(r: int) -> Factors:
    """Singular vectors of the update of a LoRA that was trained on all eight families, with R = 0."""
    tokenizer, model = base()
    tasks = [Task(name, 0, None, tokenizer, model) for name in FAMILIES[:8]]
    torch.manual_seed(0)
    tuned = lora(model, r)
    trials = list(itertools.islice(mixed(tasks), STEPS + 8))
    train(tuned, mixed(tasks), find_lr(tuned, trials, 4e-3, judged=8, progress=False).lr, MIXTURE_STEPS)
    found: Factors = {}
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            update = module.get_delta_weight("default").float()
            left, _, right = torch.linalg.svd(update, full_matrices=False)
            found[name] = left[:, :r], torch.zeros(r, r), right[:r]
    return found


@cache
def mean_adapter(r: int) -> Factors:
    """The eight families' adapters on their shared basis, each trained alone, and the mean of their R's."""
    cores = []
    for name in FAMILIES[:8]:
        torch.manual_seed(0)
        tokenizer, model = base()
        task = Task(name, 0, None, tokenizer, model)
        model = on_shared(model, EIGHT, r)
        train(model, task.batches(), measured_rate(model, task), TRAIN_STEPS)
        cores.append(factors_of(model))
    return {
        name: (b, torch.stack([found[name][1] for found in cores]).mean(0), a)
        for name, (b, _, a) in shared_factors(EIGHT, r).items()
    }


@cache
def ranks_by_energy(r: int) -> dict[str, int]:
    """Return ranks by energy of the eight families' first step, with as many parameters in all R as rank r."""
    tokenizer, model = base()
    samples = [batch for name in FAMILIES[:8] for batch in Task(name, 0, None, tokenizer, model).samples()]
    model = lorasb.patch(model, r=r, target_modules=LINEARS)
    report = lorasb.initialize(model, samples, lr=1e-3, progress=False)
    return report.suggest_ranks(parameters=r * r * len(report.layers)).rank_pattern


def measured_rate(model: Any, task: Task) -> float:
    """Return the automatic rate of an adapter on its existing basis, refined by two trials."""
    name, layers = adapted_layers(model, None)
    rate = rate_of_initialized(model, layers, task.samples(), InitOptions(adapter=name))
    return refine_rate(model, trials_of(task), rate, progress=False).lr


def trials_of(task: Task) -> list[Batch]:
    """Batches for short trials of rates."""
    return [next(task.batches()) for _ in range(STEPS + JUDGED)]


def train(model: Any, batches: Iterator[Batch], rate: float, steps: int = TRAIN_STEPS) -> None:
    """Train by AdamW with a warm-up and a linear fall."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt, warmup = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), warmup_steps(WARMUP, steps)
    for step in range(steps):
        opt.param_groups[0]["lr"] = rate * rate_share(step, steps, warmup)
        train_step(model, next(batches), opt, trained, False)
