"""Layer by layer: sums of one block at a time, from the last to the first.

One forward a micro-batch records every block's input; the gradient at the last block's output comes from the graph
above the stack. Then each block is computed again, once for each micro-batch, and differentiated: only its own sums
exist meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from .accumulator import GradientSums
from .block_recorder import DISTURBED, LEFT, Recorder, Traversal
from .block_stack import NotAStackError, Stack
from .task import Work


class Progress(Protocol):
    """Finished blocks on disk, from which an interrupted run goes on."""

    def resume(self, traversals: list[Traversal]) -> int | None:
        """The first block that is still to do, with the gradients at its output put into the traversals."""

    def finished(self, block: int, traversals: list[Traversal]) -> None:
        """A block is done, and the traversals hold the gradients at its input."""


def layerwise(
    work: Work, stack: Stack, tail: dict[str, nn.Module], keep: Callable[[Tensor], Tensor], progress: Progress | None
) -> Iterator[GradientSums]:
    """Sums of targets, some at a time: those above the stack that the record reached, then block after block.

    Args:
        work: model and samples.
        stack: the blocks.
        tail: targets outside of the stack; sums come of those above it.
        keep: what becomes of a boundary: itself, or a copy on the host.
        progress: of an earlier run, and of this one.

    Yields:
        Sums. They are the caller's to use up: nothing here keeps them.
    """
    traversals, above = record(work, stack, tail, keep)
    work.expect(len(traversals) * (len(stack.blocks) - stack.lowest))
    yield above
    start = len(stack.blocks) - 1
    resumed = progress.resume(traversals) if progress is not None else None
    for i in range(start, stack.lowest - 1, -1):
        if resumed is not None and i > resumed:
            for traversal in traversals:
                traversal.release(i)
                work.tick()
            continue
        yield block_sums(work, stack, i, traversals)
        if progress is not None:
            progress.finished(i, traversals)


def record(
    work: Work, stack: Stack, tail: dict[str, nn.Module], keep: Callable[[Tensor], Tensor]
) -> tuple[list[Traversal], GradientSums]:
    """Every traversal of the stack with the gradient at its top, and the sums of targets above it."""
    recorder = Recorder(stack, keep)
    with recorder.watching(), GradientSums(tail, work.halves, lambda: recorder.above) as sums:
        for piece in work.pieces:
            sums.muted, sums.first_half = not piece.counts, piece.first_half
            recorder.begin()
            try:
                work.backward(piece)
            except (ValueError, RuntimeError) as error:
                raise _no_stack(error, recorder) from None
            recorder.settle(piece.first_half, piece.counts)
            work.tick()
    sums.leave_out(sums.elsewhere)
    return recorder.traversals, sums


def _no_stack(error: Exception, recorder: Recorder) -> Exception:
    """The error, or what it says of the model's build where it comes from the record itself."""
    if isinstance(error, NotAStackError):
        return error
    if "leaf Variable that requires grad" in str(error):
        return NotAStackError(DISTURBED)
    if recorder.unfinished and isinstance(error, ValueError):
        return NotAStackError(LEFT)
    return error


def block_sums(work: Work, stack: Stack, i: int, traversals: list[Traversal]) -> GradientSums:
    """Sums of block i's targets; afterwards the traversals hold the gradients at its input."""
    last = max((k for k, traversal in enumerate(traversals) if traversal.counts), default=-1)
    with GradientSums(stack.targets[i], work.halves) as sums:
        for k, traversal in enumerate(traversals):
            sums.muted, sums.first_half = not traversal.counts, traversal.first_half
            sums.closing = k == last and not (work.processes.is_distributed or work.values)
            _differentiate(stack.blocks[i], i, traversal, work.device)
            work.tick()
    return sums


def _differentiate(block: nn.Module, i: int, traversal: Traversal, device: torch.device) -> None:
    stored, call, gradient = traversal.hidden[i], traversal.calls[i], traversal.gradient
    if stored is None or call is None or gradient is None:
        raise RuntimeError(f"block {i} was differentiated already")
    hidden = stored.to(gradient.device).detach().requires_grad_(True)
    output = call.repeat(block, hidden)
    torch.autograd.backward(output, gradient.to(output.device))
    traversal.gradient = hidden.grad
    traversal.release(i)
