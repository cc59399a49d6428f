"""PEFT's task type of a model, by its class."""

from __future__ import annotations

import inspect
from typing import Any

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def infer_task_type(model: Any) -> str | None:
    """PEFT's task type for a transformers model; None where there is no telling.

    PEFT's wrappers for a task pass `input_ids`, so a model of sounds or pictures has none.
    """
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    name = type(model).__name__
    for ending, task in TASKS.items():
        if name.endswith(ending):
            return task
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and name.endswith("Generation"):
        return "SEQ_2_SEQ_LM"
    if name.endswith("Model") and hasattr(model, "config"):
        return "FEATURE_EXTRACTION"
    return None
