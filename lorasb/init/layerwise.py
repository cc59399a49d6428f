"""The layerwise strategy: ΣG of one block at a time, from the last to the first.

One forward per micro-batch records every block's input, and its backward gives the gradient at the last block's output.
Then each block is recomputed and differentiated, once per micro-batch, as in activation checkpointing but block by
block over all samples: only one block's sums exist at a time. Memory for sums is O(1) in the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from .accumulator import GradientSums
from .block_recorder import EARLY_EXIT, MODIFIED_IN_PLACE, NotAStackError, Recorder, Stack, Traversal
from .svd import sketch_bytes
from .task import Work


class Progress(Protocol):
    """Persistent progress, from which an interrupted run resumes; implemented by `cache.Cache`."""

    def resume(self, traversals: list[Traversal]) -> int | None:
        """Restore the gradients of `traversals`; returns the block to go on with, or None if there is no progress."""

    def finished(self, block: int, traversals: list[Traversal]) -> None:
        """Save a finished block; `traversals` hold the gradients at its input."""


def layerwise(
    work: Work, stack: Stack, tail: dict[str, nn.Module], store: Callable[[Tensor], Tensor], progress: Progress | None
) -> Iterator[GradientSums]:
    """Sums of targets: first of those above the stack, then block by block from the last to the first.

    Args:
        work: model and samples.
        stack: the blocks.
        tail: targets outside of the stack; only those above it are summed.
        store: maps a block's input to what is stored: itself, or a copy on the host.
        progress: where finished blocks are saved, and restored from.

    Yields:
        Sums of some targets, to which no reference is kept here: the caller frees them.
    """
    traversals, above = record(work, stack, tail, store)
    work.expect(len(traversals) * (len(stack.blocks) - stack.lowest))
    yield above
    start = len(stack.blocks) - 1
    resumed = progress.resume(traversals) if progress is not None else None
    for i in range(start, stack.lowest - 1, -1):
        if resumed is not None and i > resumed:  # finished in an earlier run
            for traversal in traversals:
                traversal.release(i)
                work.tick()
            continue
        yield block_sums(work, stack, i, traversals)
        if progress is not None:
            # When the generator resumes, the caller has factored the block and added it to the cache.
            progress.finished(i, traversals)


def record(
    work: Work, stack: Stack, tail: dict[str, nn.Module], store: Callable[[Tensor], Tensor]
) -> tuple[list[Traversal], GradientSums]:
    """Traversals of the stack with the gradients at the last block's output, and the sums of targets above it."""
    recorder = Recorder(stack, store)
    with recorder.hooks(), GradientSums(tail, work.halves, lambda: recorder.above, work.sketches) as sums:
        for piece in work.pieces:
            sums.muted, sums.first_half = not piece.counts, piece.first_half
            recorder.begin()
            try:
                work.backward(piece)
            except (ValueError, RuntimeError) as error:
                raise _no_stack(error, recorder) from None
            recorder.settle(piece.first_half, piece.counts)
            work.tick()
    # A target that also ran below or inside the stack got no gradient there: its sum is incomplete, and it is left to
    # the passes over the whole model.
    sums.leave_out(sums.called_inactive)
    return recorder.traversals, sums


def _no_stack(error: Exception, recorder: Recorder) -> Exception:
    """The error of a recorded forward, or a NotAStackError if the recording itself caused it."""
    if isinstance(error, NotAStackError):
        return error
    # Autograd's error for `hidden += ...` on the leaf that a block got as its input.
    if "leaf Variable that requires grad" in str(error):
        return NotAStackError(MODIFIED_IN_PLACE)
    # A forward that left the stack early may fail in the checks of its loss, which would blame the batch.
    if recorder.unfinished and isinstance(error, ValueError):
        return NotAStackError(EARLY_EXIT)
    return error


def block_sums(work: Work, stack: Stack, i: int, traversals: list[Traversal]) -> GradientSums:
    """Sums of block i's targets; replaces the gradients at its output in `traversals` by those at its input."""
    # Fillers of sharded models may come last, and add nothing: signs are taken in the last one that counts.
    last = max((k for k, traversal in enumerate(traversals) if traversal.counts), default=-1)
    with GradientSums(stack.targets[i], work.halves, sketches=work.sketches) as sums:
        for k, traversal in enumerate(traversals):
            sums.muted, sums.first_half = not traversal.counts, traversal.first_half
            # Signs are taken in the last addition, unless other ranks' sums or the values themselves are needed.
            sums.closing = k == last and not (work.processes.is_distributed or work.values)
            _recompute_and_differentiate(stack.blocks[i], i, traversal, work.device)
            work.tick()
    return sums


def _recompute_and_differentiate(block: nn.Module, i: int, traversal: Traversal, device: torch.device) -> None:
    """Recompute a block for one traversal and run backward through it; the hooks of its targets sum on the way."""
    stored, call, gradient = traversal.hidden[i], traversal.calls[i], traversal.gradient
    if stored is None or call is None or gradient is None:
        raise RuntimeError(f"block {i} was differentiated already")
    # A fresh leaf, whose `.grad` is the gradient at the output of the block below.
    hidden = stored.to(gradient.device).detach().requires_grad_(True)
    output = call.repeat(block, hidden)
    torch.autograd.backward(output, gradient.to(output.device))
    traversal.gradient = hidden.grad
    traversal.release(i)


def accumulate(work: Work, layers: dict[str, nn.Module], budget_bytes: float) -> Iterator[GradientSums]:
    """Sums of targets, one subset per pass, from the last layer to the first.

    Args:
        work: model and samples.
        layers: targets to be summed, by name.
        budget_bytes: bytes that the sums of one pass may take; a pass always takes at least one layer.

    Yields:
        Sums of the layers that backward reached.
    """
    for subset in passes(layers, budget_bytes / (2 if work.halves else 1), work.sketch_rank):
        with GradientSums(subset, work.halves, sketches=work.sketches) as sums:
            for piece in work.pieces:
                sums.muted, sums.first_half = not piece.counts, piece.first_half
                work.backward(piece)
                work.tick()
        yield sums


def passes(layers: dict[str, nn.Module], budget_bytes: float, sketch_rank: int = 0) -> list[dict[str, nn.Module]]:
    """Subsets of consecutive layers whose fp32 sums fit into a budget, from the last layer to the first.

    Backward ends at the lowest layer that has a hook, so a pass over late layers is shorter.
    """
    subsets: list[dict[str, nn.Module]] = []
    used = 0.0
    for name in reversed(layers):
        size = sum_bytes(layers[name], sketch_rank)
        if not subsets or used + size > budget_bytes:
            subsets.append({})
            used = 0.0
        subsets[-1][name] = layers[name]
        used += size
    return subsets


def sum_bytes(layer: nn.Module, sketch_rank: int = 0) -> int:
    """Bytes of a layer's ΣG [out, in] in fp32, and of its sketches of second moments for a rank, if that is not 0."""
    size: int = 4 * layer.in_features * layer.out_features  # type: ignore[operator, assignment]
    return size + (sketch_bytes((layer.out_features, layer.in_features), sketch_rank) if sketch_rank else 0)  # type: ignore[arg-type]
