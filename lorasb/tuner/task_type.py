"""Infers PEFT's task type from a model's class name."""

from __future__ import annotations

import inspect
from typing import Any

TASK_BY_SUFFIX = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def infer_task_type(model: Any) -> str | None:
    """PEFT's task type for a transformers model; None if its class name fits none.

    PEFT's task-specific wrappers pass `input_ids`, so audio and vision models get None and the generic wrapper.
    """
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    name = type(model).__name__
    for suffix, task in TASK_BY_SUFFIX.items():
        if name.endswith(suffix):
            return task
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and name.endswith("Generation"):
        return "SEQ_2_SEQ_LM"
    # bare encoders and decoders, BertModel or LlamaModel; other libraries' models have no config
    if name.endswith("Model") and hasattr(model, "config"):
        return "FEATURE_EXTRACTION"
    return None
