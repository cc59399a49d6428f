"""Before the work: which strategy is taken, and whether the memory that it needs is there."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from .block_stack import NotAStackError, Stack, find_stack
from .cost_model import (
    Sizes,
    accumulate_memory,
    available,
    block_bytes,
    boundary_bytes,
    gb,
    layerwise_memory,
    measure,
    seconds,
    sum_room,
)
from .task import Work
from .whole_model import passes

UNCUT_BYTES = 256e6  # that blocks which are left uncut may take: an ordinary machine has it, whatever the model
LEAST_BLOCKS = 12  # of a stack whose last blocks are left uncut: in a shorter one every boundary is watched


@dataclass(frozen=True)
class Plan:
    """A strategy, why, and what it takes.

    Attributes:
        strategy: "layerwise" or "accumulate".
        why: in words.
        stack: the blocks, for "layerwise".
        on_host: whether boundaries between blocks go to the host.
        room: bytes that the sums of one pass may take.
        memory: bytes on top of the model, at the peak. seconds: of the whole.
    """

    strategy: str
    why: str
    stack: Stack | None
    on_host: bool
    room: float
    memory: float
    seconds: float

    def __str__(self) -> str:
        where = ", boundaries between blocks on the host" if self.on_host else ""
        return (
            f"{self.strategy} ({self.why}{where}): about {self.seconds:.0f} s and {gb(self.memory)} above the weights"
        )


def make_plan(work: Work, strategy: str, blocks: str | None, memory_budget: float | None) -> Plan:
    """Choose a strategy, and refuse what would not fit.

    Raises:
        NotAStackError: "layerwise" was asked for by name and the model is no stack of blocks.
        ValueError: not enough memory; the message has smaller settings that fit.
    """
    stack, why = None, "as asked"
    if strategy != "accumulate":
        try:
            stack = find_stack(work.model, work.layers, blocks)
            why = f"{len(stack.blocks)} blocks at {stack.name}"
        except NotAStackError as error:
            if strategy == "layerwise":
                raise NotAStackError(f"strategy='layerwise' does not suit this model: {error}. Use 'auto'") from None
            why = str(error)
    try:
        return plan_for(work, stack, why, memory_budget)
    except ValueError as caught:
        if stack is None or strategy == "layerwise":
            raise
        refusal = caught
    try:  # a small budget may hold the sums of some layers where it does not hold all boundaries
        return plan_for(work, None, f"boundaries of {len(stack.blocks)} blocks do not fit", memory_budget)
    except ValueError:
        raise refusal from None


def plan_for(work: Work, stack: Stack | None, why: str, memory_budget: float | None) -> Plan:
    """The plan for a stack, or for none."""
    sizes = measure(work)
    room = sum_room(work, sizes, memory_budget)
    free, host = work.processes.all_reduce_min([available(work.device), float(psutil.virtual_memory().available)])
    if stack is None:
        count = len(passes(dict(work.layers), room / (2 if work.halves else 1)))
        memory = accumulate_memory(work, sizes, room)
        _refuse_too_much(work, sizes, memory, free, None)
        return Plan("accumulate", f"{why}; {count} passes", None, False, room, memory, count * seconds(work, sizes, 6))
    boundaries = boundary_bytes(stack, sizes)
    rest = layerwise_memory(work, stack, sizes)
    limit = min(free, memory_budget) if memory_budget else free
    on_host = work.device.type != "cpu" and boundaries + rest > limit and boundaries < host
    memory = rest + (0 if on_host else boundaries)
    _refuse_too_much(work, sizes, memory, limit, stack)
    each = block_bytes(work, stack, sizes)
    uncut = uncut_blocks(work, stack, min(memory, UNCUT_BYTES, limit - memory, room), each)
    if uncut:
        why = f"{why}, of which the last {uncut} together"
    lower = stack.without_top(uncut)
    return Plan("layerwise", why, lower, on_host, room, memory + uncut * each, seconds(work, sizes, 8))


def uncut_blocks(work: Work, stack: Stack, spare: float, each: float) -> int:
    """How many blocks at the top are differentiated in the first backward, so that they are not computed again.

    A recomputation is a fifth of the time. What these blocks take at once, sums and activations of a micro-batch, is
    no more than all the rest and than UNCUT_BYTES, so that it does not grow with the number of blocks. None where
    processes keep step, or where weights come and go, as their number would have to be the same everywhere.
    """
    if len(stack.blocks) < LEAST_BLOCKS or work.processes.is_distributed:
        return 0
    if any(layer.base_must_run() for layer in work.layers.values()):
        return 0
    return max(0, min(int(spare / each), len(stack.blocks) - 1 - stack.lowest))


def _refuse_too_much(work: Work, sizes: Sizes, memory: float, limit: float, stack: Stack | None) -> None:
    if memory <= limit:
        return
    one = Sizes(**vars(sizes) | {"largest": -(-sizes.largest // sizes.rows), "rows": 1})
    fixed = boundary_bytes(stack, sizes) if stack is not None else 0.0
    least = (layerwise_memory(work, stack, one) + fixed) if stack is not None else accumulate_memory(work, one, 0.0)
    advice = []
    if sizes.rows > 1 and least <= limit:
        advice.append(f"batches of one sample ({gb(least)})")
    spare = limit - (least - fixed)
    if fixed and spare > 0:
        samples = int(spare / fixed * sizes.samples)
        if 0 < samples < sizes.samples:
            advice.append(f"num_samples={samples} in batches of one")
    if stack is None and work.layers:
        advice.append("strategy='layerwise', if the model is a stack of blocks")
    raise ValueError(
        f"initialization needs about {gb(memory)} above the weights and {gb(limit)} are there. What would fit: "
        + ("; ".join(advice) or "shorter samples, or fewer target_modules")
        + ". Nothing was changed"
    )
