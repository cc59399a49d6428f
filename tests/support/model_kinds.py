"""Kinds of models that PEFT's users bring, each with inputs and the tensor that it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import encoder, make, text
from networks import TARGETS, Net
from networks import batch as net_batch
from torch import Tensor, nn


def bert(task: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return encoder("Bert", task, **more).eval()


class Mlp(nn.Module):
    """Three linears, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(10, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def ids(**more: Any) -> dict[str, Any]:
    return {"input_ids": text(3, 10, 0)["input_ids"], **more}


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]  # the base, in evaluation mode, the same at every call
    targets: list[str]  # modules that are adapted
    task: str | None = None  # PEFT's task type
    read: str = "logits"  # the tensor of its result, or "" where that is one
    inputs: Callable[[], dict[str, Any]] = ids  # keyword arguments of a forward

    def out(self, model: nn.Module) -> Tensor:
        result = model(**self.inputs())
        return getattr(result, self.read) if self.read else result


ATTENTION = ["query", "value"]
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
KINDS = {
    "decoder": Kind(lambda: make("llama"), ["q_proj", "v_proj", "up_proj"], "CAUSAL_LM"),
    "conv1d decoder": Kind(lambda: make("gpt2"), ["c_attn", "c_fc"], "CAUSAL_LM"),
    "encoder-decoder": Kind(
        lambda: make("t5"),
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
        inputs=lambda: ids(decoder_input_ids=text(3, 6, 1)["input_ids"]),
    ),
    "sequence classification": Kind(lambda: bert("ForSequenceClassification"), ATTENTION, "SEQ_CLS"),
    "token classification": Kind(lambda: bert("ForTokenClassification"), ATTENTION, "TOKEN_CLS"),
    "question answering": Kind(
        lambda: bert("ForQuestionAnswering", num_labels=2), ATTENTION, "QUESTION_ANS", "start_logits"
    ),
    "feature extraction": Kind(lambda: bert("Model"), ATTENTION, "FEATURE_EXTRACTION", "last_hidden_state"),
    "mlp": Kind(lambda: Mlp().eval(), ["first", "second"], read="", inputs=lambda: {"x": X}),
    "no linear": Kind(lambda: Net().eval(), TARGETS, read="", inputs=lambda: {"ids": net_batch()["ids"]}),
}
