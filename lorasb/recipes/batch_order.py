"""The order of training: rows of like lengths come together, so that little is padded, and a seed decides the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

WINDOW = 50  # steps whose rows are sorted together: the order stays random over more than that


class ByLength(torch.utils.data.Sampler[int]):
    """Numbers of rows for an epoch. An epoch's order follows from seed and epoch alone, so that a run can resume.

    Args:
        lengths: tokens of every row.
        step: rows a step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch from the next pass on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (i for step in self.order(self.epoch) for i in step)

    def order(self, epoch: int) -> list[list[int]]:
        """The rows of every step of an epoch; the last step has what is left over."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        span, steps = WINDOW * self.step, list[list[int]]()
        for start in range(0, len(shuffled), span):
            window = sorted(shuffled[start : start + span], key=lambda i: (-self.lengths[i], i))
            steps += [window[i : i + self.step] for i in range(0, len(window), self.step)]
        whole = [step for step in steps if len(step) == self.step]
        mixed = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return mixed + [step for step in steps if len(step) < self.step]
