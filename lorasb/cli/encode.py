"""Examples to tensors: the completion is learned, the prompt is not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import Example

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its completion, end of text included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise prompt and completion apart, so that no token straddles them; `messages` through the chat template.

    A prompt that is too long loses its beginning; a completion that is too long loses its end.
    """
    if example.messages:
        question, answer = list(example.messages[:-1]), example.completion
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    else:
        apart = example.prompt[-1:].isspace() or example.completion[:1].isspace()
        prompt, answer = example.prompt, example.completion if apart else " " + example.completion
    ids = tokenizer(prompt, add_special_tokens=not example.messages)["input_ids"]
    completion = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][: max_length - 1]
    return Encoded(tuple(ids[-(max_length - len(completion)) :]), tuple(completion))


class Collator:
    """Pads on the left, so that completions end together and the head runs on them alone.

    Where the model's forward knows `logits_to_keep`, logits are computed for the longest completion of the batch only:
    for short answers that saves most of the head's work and memory.
    """

    def __init__(self, pad_token_id: int, model: nn.Module) -> None:
        self.pad = pad_token_id
        names = inspect.signature(model.forward).parameters
        self.trims = "logits_to_keep" in names
        self.positions = "position_ids" in names

    def __call__(self, examples: list[Encoded]) -> dict[str, Any]:
        width = max(len(example) for example in examples)
        ids = [[self.pad] * (width - len(e)) + [*e.prompt, *e.completion] for e in examples]
        labels = [[IGNORED] * (width - len(e.completion)) + [*e.completion] for e in examples]
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in examples])
        batch: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": mask, "labels": torch.tensor(labels)}
        if self.positions:
            batch["position_ids"] = positions(mask)
        if self.trims:
            keep = min(width, 1 + max(len(e.completion) for e in examples))
            batch |= {"labels": batch["labels"][:, -keep:], "logits_to_keep": keep}
        return batch


def positions(mask: Tensor) -> Tensor:
    """Positions [batch, tokens] that count from the first token which is no padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
