"""Held-out answers are the likeliest tokens, whatever a checkpoint's own settings of generation are."""

from __future__ import annotations

from pathlib import Path

import tolerances
import torch
import transformers

from lorasb.app.evaluation import evaluate, example_losses
from lorasb.app.tasks import Example
from lorasb.app.tokenize import Collator, encode


def test_a_checkpoints_own_settings_change_no_answer(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    examples = [Example("copy red red red", "red"), Example("copy two", "two")]
    encoded = [encode(example, tokenizer, 64) for example in examples]
    answers = []
    for penalty, beams in ((1.0, 1), (50.0, 3)):
        model.generation_config.repetition_penalty, model.generation_config.num_beams = penalty, beams
        answers.append(evaluate(model, tokenizer, examples, encoded, 2, "", max_new_tokens=12).answers)
    assert answers[0] == answers[1]


def test_held_out_losses_are_taken_in_fp32(tiny: Path) -> None:
    """In the logits' bf16 each token's loss would be rounded to 8 bits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    rows = [encode(Example(f"copy {word} 3", word), tokenizer, 64) for word in ("red", "blue", "two")]
    batch = Collator(tokenizer.pad_token_id, model)(rows)
    labels = batch["labels"][:, 1:].clone()
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].double()
        found = example_losses(model, batch)
    by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = by_token.sum(1) / (labels != -100).sum(1)
    tolerances.check(torch.tensor(found), expected, tolerances.fp32(1))
