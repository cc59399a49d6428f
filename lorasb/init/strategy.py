"""Carrying out a plan: sums of all targets, some at a time, by the strategies that it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accumulate import accumulate, passes, sum_bytes
from .accumulator import GradientSums
from .blocks import NotAStackError
from .budget import Plan, plan_for
from .layerwise import Progress, layerwise
from .work import Work


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
        counted = False
        with tqdm(total=0, unit="step", disable=not self.progress, leave=False) as bar:
            self.work.tick, self.work.expect = bar.update, lambda remaining: _expect(bar, remaining)
            if self.plan.stack is not None:
                steps = self._layerwise(bar, keeper)
                first = self._first(steps)
                if first is not None:
                    yield first
                    yield from steps
                    counted = True
            yield from self._accumulate(bar, counted)

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

    def _first(self, steps: Iterator[GradientSums]) -> GradientSums | None:
        """What the record gives; None where the model is no plain stack after all, for any process."""
        work, error, found = self.work, None, None
        try:
            found = next(steps)
        except NotAStackError as caught:
            error = caught
        except Exception as caught:
            work.processes.agree(caught)
            raise
        work.processes.agree(None)
        if not any(work.processes.gather(int(error is not None))):
            return found
        torch.set_grad_enabled(True)
        why = str(error) if error is not None else "another process found no plain stack"
        if self.named:
            raise NotAStackError(f"strategy='layerwise' does not suit this model: {why}. Use 'auto'")
        work.loss = 0.0
        self.plan = plan_for(work, None, why, self.memory_budget)
        return None

    def _accumulate(self, bar: tqdm, counted: bool) -> Iterator[GradientSums]:
        stack = self.plan.stack
        inside = stack.names if stack is not None else set()
        left: dict[str, nn.Module] = {n: m for n, m in self.work.layers.items() if n not in self.done | inside}
        if not left:
            return
        count = len(passes(left, self.plan.room / (2 if self.work.halves else 1)))
        bar.set_description(f"{len(left)} layers in {count} passes" if count > 1 else "first-step gradients")
        bar.reset(total=count * len(self.work.pieces))
        yield from accumulate(self.work, left, self.plan.room, counted)


def _expect(bar: tqdm, remaining: int) -> None:
    """A loss that is not understood takes its samples one by one: more steps than there were batches."""
    bar.total = bar.n + remaining
    bar.refresh()


def _as_is(boundary: Tensor) -> Tensor:
    return boundary


def _on_host(boundary: Tensor) -> Tensor:
    return boundary.cpu()
