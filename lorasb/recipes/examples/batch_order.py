"""The order of training rows: rows of similar length share a step, to save padding; else random by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

WINDOW = 50  # steps per window: rows are sorted by length within a window of shuffled rows, windows stay random


class ByLength(torch.utils.data.Sampler[int]):
    """A sampler of row indices. The order depends on seed and epoch alone, so that a resumed run repeats it.

    Args:
        lengths: number of tokens of each row.
        step: rows per optimizer step.
        seed: seed of the order.
    """

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
        """The row indices of each step of an epoch; incomplete steps come last."""
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
