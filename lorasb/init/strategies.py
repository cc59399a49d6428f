"""The two ways to sum gradients: a block at a time, or in passes over the whole model.

"layerwise": one forward per micro-batch records every block's input, and its backward gives the gradient at the last
block's output. Then each block is recomputed and differentiated, once per micro-batch, as in activation checkpointing
but block by block over all samples: only one block's sums exist at a time, so memory for sums is O(1) in the number of
blocks. "accumulate": full backward passes, each of which sums as many layers as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .accumulator import GradientSums
from .block_recorder import MODIFIED_IN_PLACE, NotAStackError, Recorder, Stack, Traversal
from .cache import Cache
from .plan import make_plan, passes, plan_for
from .task import Layers, Work


class Executor:
    """Runs a plan, and falls back to passes if the model turns out not to be a stack."""

    def __init__(self, work: Work) -> None:
        self.work, self.show = work, work.options.progress and work.processes.rank == 0
        with work.processes.together():
            self.plan = make_plan(work)  # replaced by the fallback
        self.done: set[str] = set()  # names of the targets whose factors are written; the caller adds to it

    def sums(self, saved: Cache | None) -> Iterator[GradientSums]:
        """Yield the sums of all targets that the samples reach, a block or pass at a time; the caller frees them."""
        with tqdm(total=0, unit="step", disable=not self.show, leave=False) as bar:
            self.work.tick = bar.update
            if self.plan.stack is not None:
                yield from self._synchronized(self._layerwise(self.plan.stack, bar, saved))
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
            # The fallback comes first: all ranks have to take it, even if only one of them found a reason.
            if any(self.work.processes.all_gather(int(isinstance(error, NotAStackError)))):
                self._fall_back_to_passes(str(error) if error is not None else "another process found no plain stack")
                return
            self.work.processes.raise_on_every_rank(error)
            if sums is None:
                return
            yield sums

    def _fall_back_to_passes(self, why: str) -> None:
        """Fall back to passes over the whole model."""
        torch.set_grad_enabled(True)  # the error may have interrupted a forward that had disabled gradients
        if self.work.options.strategy == "layerwise":
            raise NotAStackError(f"strategy='layerwise' does not suit this model: {why}. Use 'auto'")
        self.work.loss, self.work.labeled = 0.0, 0  # the samples will be counted again
        with self.work.processes.together():
            self.plan = plan_for(self.work, None, why)
        if self.show:
            tqdm.write(f"lorasb: {self.plan}")

    def _layerwise(self, stack: Stack, bar: tqdm, saved: Cache | None) -> Iterator[GradientSums]:
        """Yield sums: first of targets above the stack, then block by block from the last to the first."""
        work, steps = self.work, len(stack.blocks) - stack.lowest  # only blocks at or above the lowest target
        bar.set_description(f"initializing {len(stack.blocks)} blocks")
        bar.reset(total=(1 + steps) * len(work.pieces))  # one forward to record, then one recomputation per block
        # Targets outside the stack (the head) are summed in the first backward: as many as fit, starting from the last,
        # as that backward reaches only those above the stack. The others are left to the passes.
        tail: Layers = {}
        taken, inside = 0, stack.names
        for name in reversed([name for name in work.layers if name not in inside]):
            size = work.sum_bytes(work.layers[name])
            if taken + size <= self.plan.sum_budget:
                tail[name], taken = work.layers[name], taken + size
        traversals, above = record(work, stack, tail, Tensor.cpu if self.plan.on_host else _keep_on_device)
        # A batch whose loss is not recognized is run sample by sample, each one a traversal.
        bar.total = bar.n + len(traversals) * steps
        bar.refresh()
        yield above
        resumed = saved.resume(traversals, len(stack.blocks)) if saved is not None else None
        for i in range(len(stack.blocks) - 1, stack.lowest - 1, -1):
            if resumed is not None and i > resumed:  # finished in an earlier run
                for traversal in traversals:
                    del traversal.calls[i]
                    work.tick()
                continue
            yield block_sums(work, stack, i, traversals)
            if saved is not None:
                # When the generator resumes, the caller has factored the block and added it to the cache.
                saved.finished(i, stack.targets[i], traversals)

    def _accumulate(self, bar: tqdm) -> Iterator[GradientSums]:
        work, known = self.work, self.done | (self.plan.stack.names if self.plan.stack is not None else set())
        remaining = {name: m for name, m in work.layers.items() if name not in known}
        if not remaining:
            return
        subsets = passes(remaining, self.plan.sum_budget, work.sum_bytes)
        several = f"{len(remaining)} layers in {len(subsets)} passes"
        bar.set_description(several if len(subsets) > 1 else "first-step gradients")
        bar.reset(total=len(subsets) * len(work.pieces))
        for subset in subsets:
            with GradientSums(subset, sketch=work.sketch) as sums:
                for piece in work.pieces:
                    work.backward(piece, sums)
            yield sums


def _keep_on_device(boundary: Tensor) -> Tensor:
    return boundary


def record(
    work: Work, stack: Stack, tail: Layers, store: Callable[[Tensor], Tensor]
) -> tuple[list[Traversal], GradientSums]:
    """Return traversals with the gradients at the last block's output, and the sums of targets above it."""
    recorder = Recorder(stack, store)
    with recorder.hooks(), GradientSums(tail, lambda: recorder.above, work.sketch) as sums:
        for piece in work.pieces:
            try:
                work.backward(piece, sums)
            except RuntimeError as error:
                # Autograd's error for `hidden += ...` on the leaf that a block got as its input.
                if "leaf Variable that requires grad" in str(error):
                    raise NotAStackError(MODIFIED_IN_PLACE) from None
                raise
            recorder.settle(piece.counts)
    # A target that also ran below or inside the stack got no gradient there: its sum is incomplete, and it is left to
    # the passes over the whole model.
    for name in sums.called_inactive:
        sums.called.discard(name)
        sums.sums.pop(name, None)
    return recorder.traversals, sums


def block_sums(work: Work, stack: Stack, i: int, traversals: list[Traversal]) -> GradientSums:
    """Return the sums of block i's targets; in `traversals`, gradients at its output become those at its input."""
    # Signs are taken in the last addition, unless other ranks' sums or the values themselves are needed. Fillers of
    # sharded models may come last but add nothing, so `last` is the last traversal that counts.
    last = max((k for k, traversal in enumerate(traversals) if traversal.counts), default=-1)
    signs_only = not work.processes.is_distributed and work.options.update != "sgd"
    with GradientSums(stack.targets[i], sketch=work.sketch) as sums:
        for k, traversal in enumerate(traversals):
            sums.muted, sums.closing = not traversal.counts, k == last and signs_only
            call, gradient = traversal.calls.pop(i), traversal.gradient
            if gradient is None:
                raise RuntimeError(f"the blocks above block {i} do not depend on its output")
            # A fresh leaf, whose `.grad` is the gradient at the output of the block below.
            hidden = call.hidden.to(gradient.device).detach().requires_grad_(True)
            output = call.repeat(stack.blocks[i], hidden)
            torch.autograd.backward(output, gradient.to(output.device))
            traversal.gradient = hidden.grad
            work.tick()
    return sums
