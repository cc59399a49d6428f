"""Answers on tasks near the floor of a model of 135M parameters: one run each, no sweep, no seeds.

    python -m benchmarks.research.methods.floor --data-dir DATA

Scores answers to GSM8K (the number after ####, greedy) and ARC-Easy (the choice with the lowest loss, of up to five)
before and after training with LoRA-SB at the largest rank, and measures the held-out losses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.common.timing import dtype_option, measured_dtype, provenance, use_dtype
from benchmarks.research.methods import runner
from benchmarks.research.methods.adapters import put_in
from benchmarks.research.methods.grid import METHODS, TASKS, WARMUP, Cell, Task
from benchmarks.research.methods.problems import MAX_LENGTH, files, load
from benchmarks.research.methods.run import drawn, train
from lorasb.app.data import Example, read_jsonl
from lorasb.app.evaluation import HeldOut, LanguageModeling, example_losses
from lorasb.app.prepare import demo_model
from lorasb.app.tokenize import Collator, encode
from lorasb.utils.atomic_files import write_json

LR, BATCH, CHOICES = 1e-3, 16, 5
ARC = replace(TASKS["chain_sum"], name="arc_easy", metric="accuracy", data="arc_easy", validation=50, test=250)
Judge = Callable[[nn.Module, Sequence[Example], Any], float]


def final_number(text: str) -> str:
    """Return the number after the last ####."""
    return text.rpartition("####")[2].strip().replace(",", "")


def answered(model: nn.Module, examples: Sequence[Example], tokenizer: Any) -> float:
    """Share of GSM8K problems whose final number is right."""
    coded = [encode(e, tokenizer, MAX_LENGTH) for e in examples]
    given = LanguageModeling().evaluate(model, tokenizer, HeldOut(examples, coded, BATCH), "answers").answers
    pairs = [(final_number(text), final_number(e.completion)) for text, e in zip(given, examples, strict=True)]
    return sum(mine == right for mine, right in pairs) / len(pairs)


@torch.no_grad()
def chosen(model: nn.Module, examples: Sequence[Example], tokenizer: Any) -> float:
    """Share of ARC questions where the right answer has the least loss; chance is about a quarter."""
    model.eval()
    collate = Collator(tokenizer.pad_token_id, model)
    right = 0
    for example in examples:
        choices = [f"the correct answer is answer{i + 1}" for i in range(CHOICES) if f"nswer{i + 1}:" in example.prompt]
        coded = [encode(Example(example.prompt, text), tokenizer, MAX_LENGTH) for text in choices]
        losses = example_losses(model, collate(coded))
        right += choices[losses.index(min(losses))] == example.completion
    return right / len(examples)


def run(task: Task, judge: Judge, count: int, folder: Path | None) -> dict[str, Any]:
    """Score, train and score again; return the row."""
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    problem = load(task, folder, measured_dtype())
    examples = read_jsonl(files(task, folder, "test"))[:count]
    before, loss_before = judge(problem.model, examples, tokenizer), problem.loss(problem.model, "test")
    cell, warmup = Cell(task.name, "test", "LoRA-SB", task.ranks[-1], LR, 0), round(WARMUP * task.steps)
    model, _, _ = put_in(problem, METHODS["LoRA-SB"], cell, lambda n: drawn(problem, task, 0, n), warmup)
    train(model, problem, task, cell, warmup)
    return {
        "task": task.name,
        "r": cell.r,
        "lr": LR,
        "examples": task.steps * task.batch,
        "n": count,
        "before": before,
        "after": judge(model, examples, tokenizer),
        "loss_before": loss_before,
        "loss_after": problem.loss(model, "test"),
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    """Run both, print and write floor.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtype_option(parser)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, default=runner.RESULTS)
    options = parser.parse_args()
    use_dtype(options.dtype)
    found = [run(ARC, chosen, 250, options.data_dir), run(TASKS["gsm8k"], answered, 100, options.data_dir)]
    for row in found:
        Console(width=120).print(row)
    write_json(options.output / "floor.json", {**provenance(), "rows": found})


if __name__ == "__main__":
    main()
