"""Kinds of models that PEFT's users bring, each with inputs and the tensor that it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import encoder
from models import make, text
from torch import Tensor, nn
from unfolded_models import TARGETS, Net
from unfolded_models import batch as net_batch


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


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]  # the base, in evaluation mode, the same at every call
    inputs: Callable[[], dict[str, Any]]  # keyword arguments of a forward
    read: Callable[[Any], Tensor]  # the tensor of its result
    targets: list[str]  # modules that are adapted
    task: str | None = None  # PEFT's task type

    def out(self, model: nn.Module) -> Tensor:
        return self.read(model(**self.inputs()))


def ids(**more: Any) -> dict[str, Any]:
    return {"input_ids": text(3, 10, 0)["input_ids"], **more}


ATTENTION = ["query", "value"]
KINDS = {
    "decoder": Kind(lambda: make("llama"), ids, lambda y: y.logits, ["q_proj", "v_proj", "up_proj"], "CAUSAL_LM"),
    "conv1d decoder": Kind(lambda: make("gpt2"), ids, lambda y: y.logits, ["c_attn", "c_fc"], "CAUSAL_LM"),
    "encoder-decoder": Kind(
        lambda: make("t5"),
        lambda: ids(decoder_input_ids=text(3, 6, 1)["input_ids"]),
        lambda y: y.logits,
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
    ),
    "sequence classification": Kind(
        lambda: bert("ForSequenceClassification"), ids, lambda y: y.logits, ATTENTION, "SEQ_CLS"
    ),
    "token classification": Kind(
        lambda: bert("ForTokenClassification"), ids, lambda y: y.logits, ATTENTION, "TOKEN_CLS"
    ),
    "question answering": Kind(
        lambda: bert("ForQuestionAnswering", num_labels=2), ids, lambda y: y.start_logits, ATTENTION, "QUESTION_ANS"
    ),
    "feature extraction": Kind(
        lambda: bert("Model"), ids, lambda y: y.last_hidden_state, ATTENTION, "FEATURE_EXTRACTION"
    ),
    "mlp": Kind(
        lambda: Mlp().eval(),
        lambda: {"x": torch.randn(5, 10, generator=torch.Generator().manual_seed(0))},
        lambda y: y,
        ["first", "second"],
    ),
    "no linear": Kind(lambda: Net().eval(), lambda: {"ids": net_batch()["ids"]}, lambda y: y, TARGETS),
}
