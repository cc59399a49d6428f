"""The order of training: every row once, rows of like lengths together, the rest by seed."""

from __future__ import annotations

import random

import torch

from lorasb.app import estimate
from lorasb.app.tokenize import ByLength


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
        padded = sum(estimate.padded_tokens(rows, self.LENGTHS, 1) for rows in steps)
        assert padded < 1.1 * sum(self.LENGTHS)
        longest = [max(self.LENGTHS[i] for i in rows) for rows in steps[:-1]]
        assert longest != sorted(longest)
        assert longest != sorted(longest, reverse=True)

    def test_padding_is_counted_by_the_parts_of_a_step(self) -> None:
        assert estimate.padded_tokens([0, 1, 2, 3], [1, 5, 2, 2], 1) == 20
        assert estimate.padded_tokens([0, 1, 2, 3], [1, 5, 2, 2], 2) == 14
        assert estimate.padded_tokens([1], [1, 5, 2, 2], 2) == 5
