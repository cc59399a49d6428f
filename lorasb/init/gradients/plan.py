"""Choosing a strategy before any work is done, and refusing what does not fit into memory."""

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
    sum_budget,
)
from .task import Work
from .whole_model import passes

UNCUT_BYTES = 256e6  # bytes that uncut blocks may take together: an ordinary machine has them, whatever the model
MIN_BLOCKS = 12  # blocks of a stack that may have uncut ones: in shorter stacks every boundary is verified


@dataclass(frozen=True)
class Plan:
    """A strategy with its estimates.

    Attributes:
        strategy: "layerwise" or "accumulate".
        why: the reason for it, for the report.
        stack: the blocks, for "layerwise".
        on_host: True if the inputs of blocks are stored in host memory.
        sum_budget: bytes that the sums of one pass may take.
        memory: peak bytes on top of the model.
        seconds: estimated duration.
    """

    strategy: str
    why: str
    stack: Stack | None
    on_host: bool
    sum_budget: float
    memory: float
    seconds: float

    def __str__(self) -> str:
        where = ", boundaries between blocks on the host" if self.on_host else ""
        return f"{self.strategy} ({self.why}{where}): about {gb(self.memory)} above the weights"


def make_plan(work: Work, strategy: str, blocks: str | None, memory_budget: float | None) -> Plan:
    """Choose a strategy, and refuse one that does not fit. A collective: every rank makes the same plan.

    Raises:
        NotAStackError: strategy="layerwise" and the model is no stack of blocks.
        ValueError: not enough memory; the message names smaller settings that fit.
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
    try:  # a small budget may hold the sums of some layers, but not all boundaries
        return plan_for(work, None, f"boundaries of {len(stack.blocks)} blocks do not fit", memory_budget)
    except ValueError:
        raise refusal from None


def plan_for(work: Work, stack: Stack | None, why: str, memory_budget: float | None) -> Plan:
    """The layerwise plan for a stack, or the accumulate plan for None."""
    sizes = measure(work)
    budget = sum_budget(work, sizes, memory_budget)
    # The minimum over ranks: a plan has to fit on all of them.
    free, host = work.processes.all_reduce_min([available(work.device), float(psutil.virtual_memory().available)])
    if stack is None:
        count = len(passes(dict(work.layers), budget / (2 if work.halves else 1), work.sketch_rank))
        memory = accumulate_memory(work, sizes, budget)
        _refuse_too_much(work, sizes, memory, free, None)
        # 6 operations per weight and token: forward, gradient of the input, gradient of the weight
        return Plan(
            "accumulate", f"{why}; {count} passes", None, False, budget, memory, count * seconds(work, sizes, 6)
        )
    boundaries = boundary_bytes(stack, sizes)
    block_memory = layerwise_memory(work, stack, sizes)
    limit = min(free, memory_budget) if memory_budget else free
    # On the host only if they do not fit: copies over PCIe are slower than the device's own memory.
    on_host = work.device.type != "cpu" and boundaries + block_memory > limit and boundaries < host
    memory = block_memory + (0 if on_host else boundaries)
    _refuse_too_much(work, sizes, memory, limit, stack)
    per_block = block_bytes(work, stack, sizes)
    uncut = uncut_blocks(work, stack, min(memory, UNCUT_BYTES, limit - memory, budget), per_block)
    if uncut:
        why = f"{why}, of which the last {uncut} together"
    lower = stack.without_top(uncut)
    # 8 operations per weight and token: those of "accumulate", and the recomputation
    return Plan("layerwise", why, lower, on_host, budget, memory + uncut * per_block, seconds(work, sizes, 8))


def uncut_blocks(work: Work, stack: Stack, spare_bytes: float, per_block: float) -> int:
    """Number of blocks at the top that are differentiated in the first backward, and not recomputed.

    Recomputation is a fifth of the time (measured on SmolLM2-135M, two Zen 3 cores). The caller limits `spare_bytes` to
    the memory of everything else and to UNCUT_BYTES, so that memory does not grow with the number of blocks. None if
    there are several ranks, which would have to agree on the number, or if a base layer has to run its own forward
    (sharded or offloaded weights that are present only meanwhile).
    """
    if len(stack.blocks) < MIN_BLOCKS or work.processes.is_distributed:
        return 0
    if any(layer.base_must_run() for layer in work.layers.values()):
        return 0
    return max(0, min(int(spare_bytes / per_block), len(stack.blocks) - 1 - stack.lowest))


def _refuse_too_much(work: Work, sizes: Sizes, memory: float, limit: float, stack: Stack | None) -> None:
    """Raise a ValueError that suggests smaller batches or fewer samples, if `memory` is above `limit`."""
    if memory <= limit:
        return
    single = Sizes(**vars(sizes) | {"largest": -(-sizes.largest // sizes.rows), "rows": 1})
    # Boundaries of all samples are stored at the same time, so they do not shrink with the batch size.
    boundaries = boundary_bytes(stack, sizes) if stack is not None else 0.0
    # The least memory that this strategy can do with: batches of one sample, and one layer's sum per pass.
    least = (
        (layerwise_memory(work, stack, single) + boundaries)
        if stack is not None
        else accumulate_memory(work, single, 0.0)
    )
    advice = []
    if sizes.rows > 1 and least <= limit:
        advice.append(f"batches of one sample ({gb(least)})")
    for_boundaries = limit - (least - boundaries)
    if boundaries and for_boundaries > 0:
        samples = int(for_boundaries / boundaries * sizes.samples)
        if 0 < samples < sizes.samples:
            advice.append(f"num_samples={samples} in batches of one")
    if stack is None and work.layers:
        advice.append("strategy='layerwise', if the model is a stack of blocks")
    raise ValueError(
        f"initialization needs about {gb(memory)} above the weights and {gb(limit)} are there. What would fit: "
        + ("; ".join(advice) or "shorter samples, or fewer target_modules")
        + ". Nothing was changed"
    )
