"""Sums of two numbers for the reinforcement runs: problems, a partly trained starting model, and its evaluation.

Prompts hold only the problem ("What is 44 + 27?"): every prompt token adds to the cost of a step of 32 completions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lorasb.app.data import HELD_OUT_SEED, Example, generate, read_jsonl
from lorasb.app.evaluation import batches_by_length
from lorasb.app.prepare import demo_model
from lorasb.app.tokenize import IGNORED, Collator, encode
from lorasb.init.task import to_device

TASK = "chain_sum"
LEARNED, HELD_OUT = 640, 500  # training examples of the short first run; held-out examples
LEARNING = ("--r", "64", "--lr", "2e-3", "--eval-examples", "20", "--seed", "7")
BATCH = 50


def problems(work: Path, prompts: int) -> dict[str, Path]:
    """JSONL files of distinct problems: `learn`, `prompts` (of reinforcement) and `held_out`; made once."""
    files = {name: work / f"{name}.jsonl" for name in ("held_out", "learn", f"prompts-{prompts}")}
    if not all(file.is_file() for file in files.values()):
        work.mkdir(parents=True, exist_ok=True)
        drawn: list[Example] = []
        for seed, count, file in zip(
            (HELD_OUT_SEED, 7, 70_000), (HELD_OUT, LEARNED, prompts), files.values(), strict=True
        ):
            drawn += (new := generate(TASK, count, seed, exclude=drawn))
            file.write_text("".join(map(_line, new)), encoding="utf-8")
    return {name.partition("-")[0]: file for name, file in files.items()}


def _line(example: Example) -> str:
    """An example with the sum alone as its question."""
    asked = example.prompt.rpartition(": ")[2].removesuffix(" =")
    return json.dumps({"prompt": f"What is {asked}?", "completion": example.completion}) + "\n"


def merge(adapter: Path, target: Path) -> None:
    """Write the embedded model with an adapter merged into it."""
    model, tokenizer = loaded(demo_model(), adapter)
    tokenizer.save_pretrained(target)
    model.merge_and_unload().to(torch.bfloat16).save_pretrained(target)


def loaded(base: str | Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """A model in fp32, with an adapter if one is given, and its tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval(), tokenizer


@torch.no_grad()
def known(model: Any, tokenizer: Any, held_out: Path) -> tuple[float, float]:
    """Return the mean probability that a sampled answer is right, and the share of right greedy answers.

    The first is GRPO's objective (reward 1 for the right answer) on unseen problems, without sampling noise: the
    product of the probabilities of the answer's tokens, including the end token. A greedy answer is right if each of
    them is the likeliest.
    """
    encoded = [encode(example, tokenizer, 64) for example in read_jsonl(held_out)]
    collate = Collator(tokenizer.pad_token_id, model)
    chances: list[float] = []
    greedy: list[bool] = []
    for indices in batches_by_length(encoded, BATCH):
        batch = collate([encoded[i] for i in indices])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**to_device(batch, labels.device)).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        chances += losses.sum(1).neg().exp().tolist()
        greedy += ((logits.argmax(1) == labels) | (labels == IGNORED)).all(1).tolist()
    return sum(chances) / len(chances), sum(greedy) / len(greedy)
