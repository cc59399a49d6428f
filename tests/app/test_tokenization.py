"""Examples to tensors: prompts are not learned, every answer of a chat is, and long ones lose their beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from lorasb.app.tasks import Example
from lorasb.app.tokenize import IGNORED, Collator, Encoded, encode

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
CHAT = (
    {"role": "user", "content": "copy red"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "copy two"},
    {"role": "assistant", "content": "two"},
)


class TestChats:
    def tokenizer(self, folder: Any, template: str | None) -> Any:
        found = transformers.AutoTokenizer.from_pretrained(folder)
        found.chat_template = template
        return found

    def learned(self, tokenizer: Any, encoded: Encoded) -> str:
        ids = [*encoded.prompt, *encoded.completion]
        return tokenizer.decode([i for i, label in zip(ids, encoded.labels, strict=True) if label != IGNORED])

    def test_every_turn_of_the_assistants_is_learned(self, tiny: Any) -> None:
        tokenizer = self.tokenizer(tiny, CHATML)
        encoded = encode(Example("copy two", "two", CHAT), tokenizer, 200)
        want = tokenizer.decode(tokenizer("red <|end|> two")["input_ids"]) + " <eos>"
        assert self.learned(tokenizer, encoded) == want
        whole = tokenizer.apply_chat_template(list(CHAT[:-1]), add_generation_prompt=True, tokenize=False)
        assert list(encoded.prompt) == tokenizer(whole)["input_ids"]
        batch = Collator(0, transformers.AutoModelForCausalLM.from_pretrained(tiny))([encoded, Encoded((5,), (6, 7))])
        assert (batch["labels"] != IGNORED).sum(1).tolist() == [len(tokenizer(want)["input_ids"]), 2]
        assert batch["logits_to_keep"] == encoded.tail + 1 < len(encoded)

    def test_a_long_chat_loses_its_beginning(self, tiny: Any) -> None:
        tokenizer = self.tokenizer(tiny, CHATML)
        encoded = encode(Example("copy two", "two", CHAT), tokenizer, 8)
        assert len(encoded) == 8
        assert self.learned(tokenizer, encoded) == "two <eos>"
        assert encoded.learned == ()

    def test_a_template_that_rewrites_earlier_turns_has_the_last_one_learned(self, tiny: Any) -> None:
        template = "{% for m in messages %}{{ loop.length }} {{ m['content'] }} {% endfor %}"
        tokenizer = self.tokenizer(tiny, template)
        assert self.learned(tokenizer, encode(Example("copy two", "two", CHAT), tokenizer, 200)) == "two <eos>"

    def test_an_assistant_that_opens_is_not_learned(self, tiny: Any) -> None:
        tokenizer = self.tokenizer(tiny, CHATML + "{% if not messages %}{{ raise_exception('empty') }}{% endif %}")
        chat = ({"role": "assistant", "content": "red"}, *CHAT[2:])
        assert self.learned(tokenizer, encode(Example("copy two", "two", chat), tokenizer, 200)) == "two <eos>"

    def test_a_chat_that_a_template_refuses_is_named(self, tiny: Any) -> None:
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
        tokenizer = self.tokenizer(tiny, refusing)
        chat = ({"role": "system", "content": "be brief"}, *CHAT)
        with pytest.raises(ValueError, match=r"refuses a chat \(no system; roles: system, user, .* 'be brief'"):
            encode(Example("copy two", "two", chat), tokenizer, 200)

    def test_a_tokenizer_without_a_template_is_refused(self, tiny: Any) -> None:
        with pytest.raises(ValueError, match="tokenizer has no chat template: give prompt and completion"):
            encode(Example("copy two", "two", CHAT), self.tokenizer(tiny, None), 200)


def test_white_space_of_the_users_own_is_kept(tiny: Path) -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    for prompt, completion, learned in (("a", "b", " b"), ("a\n", "b", "b"), ("a", "  b\n", "  b\n")):
        encoded = encode(Example(prompt, completion), Letters(), 64)
        assert "".join(map(chr, encoded.completion[:-1])) == learned


def test_before_and_after_are_measured_alike() -> None:
    import models

    import lorasb as library

    model = models.make("gpt2")
    encoded = [Encoded((3, 4, 5) * k, (7, 8)) for k in (1, 3)]
    before = Collator(0, model)(encoded)
    patched_model = library.patch(model, r=4)
    after = Collator(0, patched_model.get_base_model())(encoded)
    assert before.keys() == after.keys() >= {"position_ids", "logits_to_keep"}


def test_prompts_are_not_learned(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    examples = [Example("copy red", "red"), Example("copy the blue cat", "blue cat")]
    encoded = [encode(e, tokenizer, 64) for e in examples]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    batch = Collator(tokenizer.pad_token_id, model)(encoded)
    assert batch["logits_to_keep"] == 4
    assert batch["labels"].shape == (2, 4)
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 3]  # the words and the end
    assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert batch["position_ids"][0, -1] == len(encoded[0]) - 1


def test_trimming_the_head_changes_no_loss(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    encoded = [encode(Example("copy red " * k, "red"), tokenizer, 64) for k in (1, 3)]
    collate, losses = Collator(tokenizer.pad_token_id, model), []
    for collate.trims in (True, False):
        losses.append(model(**collate(encoded)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_messages_go_through_the_chat_template(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    messages = ({"role": "user", "content": "copy red"}, {"role": "assistant", "content": "red"})
    encoded = encode(Example("copy red", "red", messages), tokenizer, 64)
    assert tokenizer.decode(encoded.completion) == "red <eos>"
    assert encoded.prompt == tuple(tokenizer("user copy red")["input_ids"])


def test_long_prompts_lose_their_beginning(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    encoded = encode(Example("one two " * 20 + "three", "red"), tokenizer, 8)
    assert len(encoded) == 8
    assert tokenizer.decode(encoded.prompt).endswith("three")
