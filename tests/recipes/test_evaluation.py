"""Held-out answers are the likeliest tokens, whatever a checkpoint's own settings of generation are."""

from __future__ import annotations

from pathlib import Path

import transformers

from lorasb.recipes.examples.tasks import Example
from lorasb.recipes.examples.tokenization import encode
from lorasb.recipes.problems.evaluation import evaluate


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
