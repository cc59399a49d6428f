"""Examples to tensors: completions are learned, and a chat's earlier answers; prompts are not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import Example

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its completion, end of text included.

    `learned` says of each token of the prompt whether it belongs to an earlier answer of the assistant's; it is empty
    where none does.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    learned: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def labels(self) -> list[int]:
        """What is to be predicted at each token, IGNORED where nothing is."""
        marks = self.learned or (False,) * len(self.prompt)
        return [t if mark else IGNORED for t, mark in zip(self.prompt, marks, strict=True)] + [*self.completion]

    @property
    def tail(self) -> int:
        """Tokens from the first learned one to the end."""
        return len(self) - self.learned.index(True) if True in self.learned else len(self.completion)


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize prompt and completion apart, so that no token straddles them; `messages` through the chat template.

    A prompt that is too long loses its beginning; a completion that is too long loses its end.

    Raises:
        ValueError: messages, and a tokenizer without a chat template.
    """
    if example.messages:
        pieces, answer = _conversation(list(example.messages), tokenizer), example.completion
    else:
        apart = example.prompt[-1:].isspace() or example.completion[:1].isspace()
        pieces, answer = [(example.prompt, False)], example.completion if apart else " " + example.completion
    ids: list[int] = []
    learned: list[bool] = []
    for text, mark in pieces:
        found = tokenizer(text, add_special_tokens=not example.messages)["input_ids"]
        ids += found
        learned += [mark] * len(found)
    completion = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][: max_length - 1]
    kept = slice(-(max_length - len(completion)), None)
    marks = tuple(learned[kept]) if any(learned[kept]) else ()
    return Encoded(tuple(ids[kept]), tuple(completion), marks)


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """What comes before the last answer, in pieces: the assistant's turns are learned, the others' are not.

    Where a template writes a turn otherwise once others follow, the earlier turns cannot be told apart, and none of
    them is learned.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the data has messages, and this model's tokenizer has no chat template: give prompt and completion, or "
            "a --model whose tokenizer has one"
        )

    def rendered(turns: list[dict[str, str]], generation: bool) -> str:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=generation, tokenize=False))

    whole = rendered(messages[:-1], True)
    pieces: list[tuple[str, bool]] = []
    seen = ""
    for k, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        head, after = rendered(messages[:k], True), rendered(messages[: k + 1], False)
        if not (head.startswith(seen) and after.startswith(head) and whole.startswith(after)):
            return [(whole, False)]
        pieces += [(head[len(seen) :], False), (after[len(head) :], True)]
        seen = after
    return [*pieces, (whole[len(seen) :], False)]


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
        labels = [[IGNORED] * (width - len(e)) + e.labels for e in examples]
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in examples])
        batch: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": mask, "labels": torch.tensor(labels)}
        if self.positions:
            batch["position_ids"] = positions(mask)
        if self.trims:
            keep = min(width, 1 + max(e.tail for e in examples))
            batch |= {"labels": batch["labels"][:, -keep:], "logits_to_keep": keep}
        return batch


def positions(mask: Tensor) -> Tensor:
    """Positions [batch, tokens] that count from the first token which is no padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def with_progress(call: Callable[[Example], Encoded], examples: Iterable[Example], title: str) -> list[Encoded]:
    """Encode examples, with a bar where that takes more than two seconds."""
    from tqdm.auto import tqdm

    return [call(example) for example in tqdm(examples, desc=title, unit="example", delay=2, leave=False)]
