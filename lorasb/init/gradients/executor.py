"""Carrying out a plan: sums of all targets, some at a time, by the strategies that it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accumulator import GradientSums
from .block_stack import NotAStackError
from .layerwise import Progress, layerwise
from .plan import Plan, plan_for
from .task import Work
from .whole_model import accumulate, passes, sum_bytes


class Strategy:
    """A plan under way.

    Attributes:
        plan: what is done; another one than the first where the model turns out to be no stack.
        done: names of the targets that are through, kept by the caller.
    """

    def __init__(self, work: Work, plan: Plan, named: bool, memory_budget: float | None, progress: bool) -> None:
        self.work, self.plan, self.named = work, plan, named
        self.memory_budget, self.progress = memory_budget, progress
        self.done: set[str] = set()

    def sums(self, keeper: Progress | None) -> Iterator[GradientSums]:
        """Sums of all targets that the samples reach, some at a time."""
        with tqdm(total=0, unit="step", disable=not self.progress, leave=False) as bar:
            self.work.tick, self.work.expect = bar.update, lambda remaining: _expect(bar, remaining)
            if self.plan.stack is not None:
                yield from self._together(self._layerwise(bar, keeper))
            yield from self._together(self._accumulate(bar))

    def _together(self, steps: Iterator[GradientSums]) -> Iterator[GradientSums]:
        """Step by step with the other processes: what one of them meets ends it for all."""
        while True:
            found, error = None, None
            try:
                found = next(steps, None)
            except Exception as caught:
                error = caught
            if any(self.work.processes.all_gather(int(isinstance(error, NotAStackError)))):
                self._plan_again(error)
                return
            self.work.processes.raise_on_every_rank(error)
            if found is None:
                return
            yield found

    def _plan_again(self, error: Exception | None) -> None:
        """The model is no plain stack after all.

        Raises:
            NotAStackError: but one was asked for.
        """
        torch.set_grad_enabled(True)
        why = str(error) if error is not None else "another process found no plain stack"
        if self.named:
            raise NotAStackError(f"strategy='layerwise' does not suit this model: {why}. Use 'auto'")
        self.work.loss, self.work.labeled = 0.0, 0
        refusal: Exception | None = None
        try:
            self.plan = plan_for(self.work, None, why, self.memory_budget)
        except ValueError as caught:
            refusal = caught
        self.work.processes.raise_on_every_rank(refusal)
        if self.progress:
            tqdm.write(f"lorasb: {self.plan}")

    def _layerwise(self, bar: tqdm, keeper: Progress | None) -> Iterator[GradientSums]:
        work, stack = self.work, self.plan.stack
        if stack is None:
            return
        bar.set_description(f"{len(stack.blocks)} blocks, one at a time")
        bar.reset(total=(len(stack.blocks) - stack.lowest + 1) * len(work.pieces))
        outside = {name: layer for name, layer in work.layers.items() if name not in stack.names}
        above: dict[str, nn.Module] = {}
        for name in reversed(outside):  # the head's sums exist together: as many as fit
            if sum(map(sum_bytes, above.values())) + sum_bytes(outside[name]) <= self.plan.room:
                above[name] = outside[name]
        yield from layerwise(work, stack, above, _on_host if self.plan.on_host else _as_is, keeper)

    def _accumulate(self, bar: tqdm) -> Iterator[GradientSums]:
        stack = self.plan.stack
        inside = stack.names if stack is not None else set()
        left: dict[str, nn.Module] = {n: m for n, m in self.work.layers.items() if n not in self.done | inside}
        if not left:
            return
        count = len(passes(left, self.plan.room / (2 if self.work.halves else 1)))
        bar.set_description(f"{len(left)} layers in {count} passes" if count > 1 else "first-step gradients")
        bar.reset(total=count * len(self.work.pieces))
        yield from accumulate(self.work, left, self.plan.room)


def _expect(bar: tqdm, remaining: int) -> None:
    """A loss that is not understood takes its samples one by one: more steps than there were batches."""
    bar.total = bar.n + remaining
    bar.refresh()


def _as_is(boundary: Tensor) -> Tensor:
    return boundary


def _on_host(boundary: Tensor) -> Tensor:
    return boundary.cpu()
