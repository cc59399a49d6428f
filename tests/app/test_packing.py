"""Packs: full rows, and the loss of their examples one by one."""

from __future__ import annotations

import random
from typing import Any

import models
import pytest
import torch

from lorasb.app import tokenize
from lorasb.app.tokenize import Collator, Encoded


class TestPacks:
    def examples(self, count: int = 40) -> list[Encoded]:
        draw = random.Random(1)
        return [
            Encoded(tuple(draw.choices(range(3, 99), k=draw.randint(1, 9))), tuple(draw.choices(range(3, 99), k=3)))
            for _ in range(count)
        ]

    def test_all_examples_are_in_rows_that_are_full(self) -> None:
        examples = self.examples()
        rows = tokenize.pack(examples, 32)
        assert sorted((e for row in rows for e in row), key=repr) == sorted(examples, key=repr)
        assert max(map(tokenize.row_length, rows)) <= 32
        assert len(rows) <= 1.2 * sum(map(len, examples)) / 32

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
    def test_the_loss_of_packs_is_that_of_their_examples(self, family: str) -> None:
        model: Any = models.make(family)
        examples = self.examples(9)
        tokenize.check_model(model)
        packed = tokenize.PackCollator(0)(tokenize.pack(examples, 30))
        alone = Collator(0, model)(examples)
        with torch.no_grad():
            losses = [model(**batch).loss.item() for batch in (packed, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_a_model_whose_examples_see_one_another_is_refused(self) -> None:
        model: Any = models.make("llama")
        forward = model.forward
        model.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids)
        with pytest.raises(ValueError, match="--packing: in a LlamaForCausalLM packed examples see one another"):
            tokenize.check_model(model)
        model.forward = lambda input_ids: forward(input_ids)
        with pytest.raises(ValueError, match="--packing: this model takes no position_ids"):
            tokenize.check_model(model)
