"""Parts of `lorasb finetune` on their own: the order of training, packs, chats, the plan."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import transformers

from lorasb.recipes import adapter as adapting
from lorasb.recipes import estimate as plan
from lorasb.recipes import packing
from lorasb.recipes.batch_order import ByLength
from lorasb.recipes.settings import Settings
from lorasb.recipes.tasks import Example
from lorasb.recipes.tokenization import IGNORED, Collator, Encoded, encode
from lorasb.utils.precision import Precision


class TestOrder:
    LENGTHS = tuple(random.Random(0).choices(range(5, 60), k=1003))

    def test_every_row_comes_once_an_epoch_and_the_seed_decides(self) -> None:
        order = ByLength(self.LENGTHS, 16, 3)
        first = list(order)
        assert sorted(first) == list(range(1003))
        assert list(ByLength(self.LENGTHS, 16, 3)) == first
        assert list(ByLength(self.LENGTHS, 16, 4)) != first
        order.set_epoch(1)
        assert sorted(order) == sorted(first)
        assert list(order) != first
        torch.manual_seed(5)
        state = torch.get_rng_state()
        list(order)
        assert torch.equal(torch.get_rng_state(), state)

    def test_little_is_padded_and_steps_are_whole(self) -> None:
        steps = ByLength(self.LENGTHS, 16, 0).order(0)
        assert [len(rows) for rows in steps] == [16] * 62 + [11]
        padded = sum(plan.padded_tokens(rows, self.LENGTHS, 1) for rows in steps)
        assert padded < 1.1 * sum(self.LENGTHS)
        longest = [max(self.LENGTHS[i] for i in rows) for rows in steps[:-1]]
        assert longest != sorted(longest)
        assert longest != sorted(longest, reverse=True)

    def test_padding_is_counted_by_the_parts_of_a_step(self) -> None:
        assert plan.padded_tokens([0, 1, 2, 3], [1, 5, 2, 2], 1) == 20
        assert plan.padded_tokens([0, 1, 2, 3], [1, 5, 2, 2], 2) == 14
        assert plan.padded_tokens([1], [1, 5, 2, 2], 2) == 5


class TestPacks:
    def examples(self, count: int = 40) -> list[Encoded]:
        draw = random.Random(1)
        return [
            Encoded(tuple(draw.choices(range(3, 99), k=draw.randint(1, 9))), tuple(draw.choices(range(3, 99), k=3)))
            for _ in range(count)
        ]

    def test_all_examples_are_in_rows_that_are_full(self) -> None:
        examples = self.examples()
        rows = packing.pack(examples, 32)
        assert sorted((e for row in rows for e in row), key=repr) == sorted(examples, key=repr)
        assert max(map(packing.row_length, rows)) <= 32
        assert len(rows) <= 1.2 * sum(map(len, examples)) / 32

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    def test_the_loss_of_packs_is_that_of_their_examples(self, family: str) -> None:
        model: Any = models.make(family)
        examples = self.examples(9)
        packing.check_model(model)
        packed = packing.PackCollator(0)(packing.pack(examples, 30))
        alone = Collator(0, model)(examples)
        with torch.no_grad():
            losses = [model(**batch).loss.item() for batch in (packed, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_a_model_whose_examples_see_one_another_is_refused(self) -> None:
        model: Any = models.make("llama")
        forward = model.forward
        model.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids)
        with pytest.raises(ValueError, match="--packing: in a LlamaForCausalLM packed examples see one another"):
            packing.check_model(model)
        model.forward = lambda input_ids: forward(input_ids)
        with pytest.raises(ValueError, match="--packing: this model takes no position_ids"):
            packing.check_model(model)


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
CHAT = (
    {"role": "user", "content": "copy red"}, {"role": "assistant", "content": "red"},
    {"role": "user", "content": "copy two"}, {"role": "assistant", "content": "two"},
)  # fmt: skip


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

    def test_a_tokenizer_without_a_template(self, tiny: Any) -> None:
        with pytest.raises(ValueError, match="tokenizer has no chat template: give prompt and completion"):
            encode(Example("copy two", "two", CHAT), self.tokenizer(tiny, None), 200)


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*layers\.[01]\..*proj", r".*layers\.[01]\..*proj"),
    ],
)
def test_targets(said: str | None, want: Any) -> None:
    assert adapting.targets(said) == want


class TestPlan:
    def run(self, name: str = "float32", **values: Any) -> Any:
        rows = [Encoded((1,) * 20, (2,) * 5)] * 64
        return SimpleNamespace(
            settings=replace(Settings(), **values), precision=Precision(name, ""), rows=rows, steps=125, tokens=50_000
        )

    def test_the_first_step_is_slower_and_the_longest_needs_more(self) -> None:
        found = plan.estimate([(9.0, 100), (2.0, 200)], 10_000, 400, (10**9, 2 * 10**9))
        assert found.seconds == pytest.approx(100)
        assert found.memory == 3 * 10**9

    def test_what_is_said(self) -> None:
        (line,) = plan.estimated(self.run(), plan.Estimate(260, 2_100_000_000))
        assert (
            line
            == "Training on the CPU in float32: 125 steps of 16 examples, 50,000 tokens: about 4 min and 2.1 GB, by the first steps"
        )

    @pytest.mark.parametrize(
        ("values", "want"),
        [
            ({}, "--train-examples 1000 (half of the steps)"),
            ({"data": "x"}, "--epochs 0.5 (half of the steps)"),
            ({"data": "x", "epochs": 6.0}, "--epochs 1"),
            ({"train_examples": 50_000}, "--train-examples 2000"),
            ({"name": "bfloat16"}, r"--dtype auto (float32 here)"),
            ({"max_length": 10}, "--max-length 5"),
        ],
    )
    def test_a_long_run_is_told_what_costs_most(
        self, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], want: str
    ) -> None:
        monkeypatch.setattr(plan, "native", lambda: Precision("float32", ""))
        monkeypatch.setattr(plan, "slowdown", lambda dtype: 40.0)
        run = self.run(**values)
        first, second = plan.estimated(run, plan.Estimate(3 * 3600, 10**9))
        assert "about 3.0 h" in first
        assert second.startswith(f"That is long, and {want}")
        name, saved = plan.costliest(run, 3 * 3600)
        assert name == want
        assert 0 < saved < 3 * 3600
