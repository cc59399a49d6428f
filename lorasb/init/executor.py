"""Running a plan: yields the sums of all targets, some at a time, and falls back if the model is no stack after all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accumulator import GradientSums
from .block_recorder import NotAStackError
from .layerwise import Progress, accumulate, layerwise, passes, sum_bytes
from .plan import InitPlan, plan_for
from .task import Work


class Executor:
    """Runs a plan.

    Args:
        work: model and samples.
        plan: what to do first.
        named: True if the caller asked for "layerwise" by name, so that there is no fallback.
        memory_budget: for the plan of the fallback.
        progress: show a progress bar.

    Attributes:
        plan: the plan in use; replaced by the fallback if the model turns out to be no stack.
        done: names of the targets whose factors are written; the caller adds to it.
    """

    def __init__(self, work: Work, plan: InitPlan, named: bool, memory_budget: float | None, progress: bool) -> None:
        self.work, self.plan, self.named = work, plan, named
        self.memory_budget, self.progress = memory_budget, progress
        self.done: set[str] = set()

    def sums(self, saved: Progress | None) -> Iterator[GradientSums]:
        """Sums of all targets that the samples reach, some at a time; the next ones are taken when they are freed.

        Args:
            saved: where finished blocks are saved, and restored from.
        """
        with tqdm(total=0, unit="step", disable=not self.progress, leave=False) as bar:
            self.work.tick, self.work.expect = bar.update, lambda remaining: _expect(bar, remaining)
            if self.plan.stack is not None:
                yield from self._synchronized(self._layerwise(bar, saved))
            # Targets outside of the stack, or all that are left after a fallback.
            yield from self._synchronized(self._accumulate(bar))

    def _synchronized(self, steps: Iterator[GradientSums]) -> Iterator[GradientSums]:
        """Advance `steps` on all ranks together: errors and the fallback on one rank end it on every rank."""
        while True:
            sums, error = None, None
            try:
                sums = next(steps, None)
            except Exception as caught:
                error = caught
            # First the fallback: it has to be taken on all ranks even if only one of them has found a reason.
            if any(self.work.processes.all_gather(int(isinstance(error, NotAStackError)))):
                self._plan_again(error)
                return
            self.work.processes.raise_on_every_rank(error)
            if sums is None:
                return
            yield sums

    def _plan_again(self, error: Exception | None) -> None:
        """Fall back to passes over the whole model; `error` is this rank's reason, or None if it has none.

        Raises:
            NotAStackError: strategy="layerwise" was asked for.
        """
        torch.set_grad_enabled(True)  # the error may have left a forward that had switched gradients off
        why = str(error) if error is not None else "another process found no plain stack"
        if self.named:
            raise NotAStackError(f"strategy='layerwise' does not suit this model: {why}. Use 'auto'")
        self.work.loss, self.work.labeled = 0.0, 0  # the samples will be counted again
        refusal: Exception | None = None
        try:
            self.plan = plan_for(self.work, None, why, self.memory_budget)
        except ValueError as caught:
            refusal = caught
        self.work.processes.raise_on_every_rank(refusal)
        if self.progress:
            tqdm.write(f"lorasb: {self.plan}")

    def _layerwise(self, bar: tqdm, saved: Progress | None) -> Iterator[GradientSums]:
        work, stack = self.work, self.plan.stack
        if stack is None:
            return
        bar.set_description(f"{len(stack.blocks)} blocks, one at a time")
        # One forward to record, then one recomputation per block that has targets at or below it.
        bar.reset(total=(len(stack.blocks) - stack.lowest + 1) * len(work.pieces))
        outside = {name: layer for name, layer in work.layers.items() if name not in stack.names}
        above: dict[str, nn.Module] = {}
        # Sums outside of the stack (the head's) are all taken in the first backward: as many as fit, from the last one
        # on, as only those above the stack are reached. The others are left to the passes.
        for name in reversed(outside):
            taken = sum(sum_bytes(layer, self.work.sketch_rank) for layer in (*above.values(), outside[name]))
            if taken <= self.plan.sum_budget:
                above[name] = outside[name]
        yield from layerwise(work, stack, above, _to_host if self.plan.on_host else _keep_on_device, saved)

    def _accumulate(self, bar: tqdm) -> Iterator[GradientSums]:
        stack = self.plan.stack
        inside = stack.names if stack is not None else set()
        remaining: dict[str, nn.Module] = {n: m for n, m in self.work.layers.items() if n not in self.done | inside}
        if not remaining:
            return
        count = len(passes(remaining, self.plan.sum_budget / (2 if self.work.halves else 1), self.work.sketch_rank))
        bar.set_description(f"{len(remaining)} layers in {count} passes" if count > 1 else "first-step gradients")
        bar.reset(total=count * len(self.work.pieces))
        yield from accumulate(self.work, remaining, self.plan.sum_budget)


def _expect(bar: tqdm, remaining: int) -> None:
    """Correct the bar's total: a batch whose loss is not recognized is run sample by sample, each one a traversal."""
    bar.total = bar.n + remaining
    bar.refresh()


def _keep_on_device(boundary: Tensor) -> Tensor:
    return boundary


def _to_host(boundary: Tensor) -> Tensor:
    return boundary.cpu()
