"""Tokenization and collation. Labels cover completions and, in chats, earlier assistant turns; prompts are masked."""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..constants import IGNORED
from ..init.sampling import Batch
from ..init.task import modes_restored
from .data import Example

Rows = list[Any]  # encoded examples (Encoded of a language model, EncodedText of a classifier), or packs of them
Collate = Callable[[Rows], Batch]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its completion, which ends with the end-of-text token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    learned: tuple[bool, ...] = ()  # True for prompt tokens of earlier assistant turns; empty if there are none
    adapter: str = ""  # of the example
    is_cut: bool = False  # longer than `max_length`

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def labels(self) -> list[int]:
        """Labels, one per token: the token itself, or IGNORED; the model shifts them."""
        marks = self.learned or (False,) * len(self.prompt)
        return [t if mark else IGNORED for t, mark in zip(self.prompt, marks, strict=True)] + [*self.completion]

    @property
    def tail(self) -> int:
        """Number of tokens from the first one with a label to the end."""
        return len(self) - self.learned.index(True) if True in self.learned else len(self.completion)


def encode(
    example: Example, tokenizer: Tokenizer, max_length: int, whole_prompt: bool = False, template: bool = False
) -> Encoded:
    """Tokenize prompt and completion separately, so that no token spans both; `messages` use the chat template."""
    # With `template`, prompts do too, if the tokenizer has one. Beyond `max_length`, the prompt is cut at its start;
    # with `whole_prompt` first the completion at its end, down to max_length / 8: a question outranks a long answer.
    messages, answer = messages_of(example, tokenizer, template), example.completion
    if messages:
        pieces = _conversation(messages, tokenizer)
    else:
        pieces = [(example.prompt, False)]
        # The space between them goes to the completion, as tokenizers merge it with the following word.
        if not example.prompt[-1:].isspace() and not answer[:1].isspace():
            answer = " " + answer
    ids: list[int] = []
    learned: list[bool] = []
    for text, mark in pieces:
        # a chat template writes the special tokens (BOS) itself
        text_ids = (
            _continuation_ids(text, tokenizer) if ids else tokenizer(text, add_special_tokens=not messages)["input_ids"]
        )
        ids += text_ids
        learned += [mark] * len(text_ids)
    if not ids:  # a text without a prompt: its first token is predicted from BOS, or else EOS
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids, learned = [first], [False]
    completion = [*_continuation_ids(answer, tokenizer), tokenizer.eos_token_id]
    is_cut = len(ids) + len(completion) > max_length
    completion = completion[: max(max_length - len(ids), max_length // 8, 1) if whole_prompt else max_length - 1]
    room = max_length - len(completion)
    prompt, marks = tuple(ids[-room:]), tuple(learned[-room:])
    return Encoded(prompt, tuple(completion), marks if any(marks) else (), example.adapter, is_cut)


def _continuation_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a text that follows another: SentencePiece would add a space before it."""
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # it merges the newline with the text


def messages_of(example: Example, tokenizer: Tokenizer, template: bool) -> tuple[dict[str, str], ...]:
    """Return the example as a chat: its messages or, with `template`, question and answer; () for plain text."""
    if example.messages or not template or example.formatted or getattr(tokenizer, "chat_template", None) is None:
        return example.messages
    if any(token in example.prompt for token in tokenizer.all_special_tokens):  # it already has chat markup
        return ()
    return {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}


def _conversation(messages: tuple[dict[str, str], ...], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Split the chat before the last answer into (text, learned) pieces; assistant turns are learned."""
    # Turn boundaries are found by rendering growing prefixes of the chat. Some templates render a turn differently
    # once others follow: then the prefixes do not match, and no earlier turn is learned.
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("got messages, and this model's tokenizer has no chat template: give prompt and completion")
    full_text = _rendered(tokenizer, messages[:-1], True)
    pieces: list[tuple[str, bool]] = []
    rendered_so_far = ""
    for k, message in enumerate(messages[:-1]):
        # templates cannot render an empty chat, so an opening assistant turn is not learned
        if message["role"] != "assistant" or k == 0:
            continue
        # head ends with the generation prompt ("assistant:"), which is given at inference and is not learned
        head, after = _rendered(tokenizer, messages[:k], True), _rendered(tokenizer, messages[: k + 1], False)
        if not (head.startswith(rendered_so_far) and after.startswith(head) and full_text.startswith(after)):
            return [(full_text, False)]
        pieces += [(head[len(rendered_so_far) :], False), (after[len(head) :], True)]
        rendered_so_far = after
    return [*pieces, (full_text[len(rendered_so_far) :], False)]


def _rendered(tokenizer: Tokenizer, turns: tuple[dict[str, str], ...], generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=generation, tokenize=False))
    except TemplateError as error:  # templates may reject roles, or their order
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"the tokenizer's chat template refuses a chat ({error}; roles: {roles}; it begins "
            f"{turns[0]['content'][:60]!r}): change these messages, or take a --model whose template accepts them"
        ) from None


class Collator:
    """Collator that pads on the left, so that completions align at the end of the rows.

    If the base model's forward takes `logits_to_keep`, logits are computed only for the length of the batch's longest
    completion: for short answers that saves most of the head's time and memory. Batches name the rows' adapters, if the
    model has them.
    """

    def __init__(self, pad_token_id: int, model: nn.Module) -> None:
        self.pad, self.model = pad_token_id, model
        base = getattr(model, "get_base_model", lambda: model)()  # the forward of PEFT's wrapper lacks logits_to_keep
        names = inspect.signature(base.forward).parameters
        self.trims = "logits_to_keep" in names
        self.positions = "position_ids" in names

    def __call__(self, examples: list[Encoded]) -> Batch:
        mask = padded([[1] * len(e) for e in examples], 0)
        batch: Batch = {
            "input_ids": padded([e.prompt + e.completion for e in examples], self.pad),
            "attention_mask": mask,
            "labels": padded([e.labels for e in examples], IGNORED),
            **_adapters_of(self.model, examples),
        }
        # Without position_ids, models count positions from the padding.
        if self.positions:
            batch["position_ids"] = positions(mask)
        if self.trims:
            # one more: the first label is predicted by the logit before it
            keep = min(mask.shape[1], 1 + max(e.tail for e in examples))
            batch |= {"labels": batch["labels"][:, -keep:], "logits_to_keep": keep}
        return batch


def _adapters_of(model: nn.Module, rows: Sequence[Encoded]) -> dict[str, list[str]]:
    """Return the rows' `adapter_names`, if the model has adapters with these names; else nothing."""
    names = [row.adapter for row in rows]
    return {"adapter_names": names} if set(names) <= getattr(model, "peft_config", {}).keys() else {}


def collate_prompts(rows: Sequence[Encoded], pad: int, model: nn.Module) -> Batch:
    """Collate prompts, without completions, for `model.generate`, padded on the left."""
    mask = padded([[1] * len(row.prompt) for row in rows], 0)
    ids = padded([row.prompt for row in rows], pad)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), **_adapters_of(model, rows)}


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text or a pair of texts, and the class index or value to learn."""

    inputs: dict[str, list[int]]
    target: int | float
    is_cut: bool = False  # cut at `max_length`, or exactly that long

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


def collate_texts(examples: Sequence[EncodedText], pad: int) -> Batch:
    """Collate texts, padded on the right, with `labels`."""
    pads = {"input_ids": pad}  # other inputs (attention_mask, token_type_ids) are padded with zeros
    batch: Batch = {n: padded([e.inputs[n] for e in examples], pads.get(n, 0), "right") for n in examples[0].inputs}
    return batch | {"labels": torch.tensor([e.target for e in examples])}


def padded(rows: Iterable[Sequence[int]], value: int, side: str = "left") -> Tensor:
    """Pad rows of numbers to one tensor [rows, longest row]."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def positions(mask: Tensor) -> Tensor:
    """Position ids [batch, tokens] that start at 0 at the first token after the padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


WINDOW = 50  # steps per window: rows are shuffled, then sorted by length only within each window


class ByLength(torch.utils.data.Sampler[int]):
    """Sampler that groups rows by length, `step` rows per optimizer step; the order depends only on seed and epoch."""

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Use the order of another epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (i for step in self.order(self.epoch) for i in step)

    def order(self, epoch: int) -> list[list[int]]:
        """Return the row indices of each step of an epoch; incomplete steps come last."""
        # Distinct for every (seed, epoch) below 1,000,003 epochs; seed + epoch would repeat orders of other seeds.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        window_rows, steps = WINDOW * self.step, list[list[int]]()
        for start in range(0, len(shuffled), window_rows):
            # longest first, and the index breaks ties: the same order on every machine
            window = sorted(shuffled[start : start + window_rows], key=lambda i: (-self.lengths[i], i))
            steps += [window[i : i + self.step] for i in range(0, len(window), self.step)]
        # Steps are shuffled again, or every window would run from long rows to short ones.
        full_steps = [step for step in steps if len(step) == self.step]
        shuffled_steps = [full_steps[i] for i in torch.randperm(len(full_steps), generator=generator).tolist()]
        return shuffled_steps + [step for step in steps if len(step) < self.step]


Pack = tuple[Encoded, ...]
# Relative to the largest logit: bf16 rounds to 0.4%, while attention across examples changes logits far more.
TOLERANCE = 0.05


def pack(examples: Sequence[Encoded], length: int) -> list[Pack]:
    """Pack examples into rows of up to `length` tokens: first fit, in order of decreasing length."""
    rows: list[list[Encoded]] = []
    by_free: dict[int, list[int]] = {}  # free tokens -> heap of row indices: searching all rows is quadratic
    for example in sorted(examples, key=len, reverse=True):
        fitting = ((heap[0], free) for free, heap in by_free.items() if heap and free >= len(example))
        row_index, free = min(fitting, default=(len(rows), length))
        if row_index == len(rows):
            rows.append([])
        else:
            heapq.heappop(by_free[free])
        rows[row_index].append(example)
        heapq.heappush(by_free.setdefault(free - len(example), []), row_index)
    return [tuple(row) for row in rows]


def row_length(row: Encoded | EncodedText | Pack) -> int:
    """Number of tokens of an example or a pack."""
    return sum(map(len, row)) if isinstance(row, tuple) else len(row)


def collate_packs(packs: Sequence[Pack], pad: int) -> Batch:
    """Collate packs, padded on the right, with positions that restart at 0 in each example."""
    # No attention mask: transformers derives the block-diagonal mask from restarting position_ids only without one.
    width = max(row_length(row) for row in packs)
    ids = [[t for e in row for t in e.prompt + e.completion] for row in packs]
    # the first token has no label: the logit before it belongs to the previous example
    labels = [[t for e in row for t in (IGNORED, *e.labels[1:])] for row in packs]
    # padding positions restart at 0, too: attention sees one more example, without labels
    lengths = [[*map(len, row), width - row_length(row)] for row in packs]
    return {
        "input_ids": padded(ids, pad, "right"),
        "labels": padded(labels, IGNORED, "right"),
        "position_ids": torch.tensor([[i for length in row for i in range(length)] for row in lengths]),
        "use_cache": False,  # transformers looks for packed position_ids only without a KV cache
    }


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Raise a ValueError if an example has different logits packed than alone."""
    device = next(model.parameters()).device
    first, second = Encoded((5, 6, 7), (8, 9)), Encoded((9, 8), (7, 6, 5))
    batch = collate_packs([(first, second)], 0)
    ids, position_ids = batch["input_ids"].to(device), batch["position_ids"].to(device)
    try:
        with modes_restored(model):
            model.eval()
            packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0, len(first) :].float()
            single = model(input_ids=ids[:, len(first) :]).logits[0].float()
    except TypeError as error:
        raise ValueError(f"--packing: this model takes no position_ids ({error}): train without it") from None
    if (packed - single).abs().max() > TOLERANCE * single.abs().max():
        raise ValueError(f"--packing: in a {type(model).__name__} packed examples see one another: train without it")
