"""Choose a strategy before any work is done, and refuse a plan that does not fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from ..layers.adapted_layer import AdaptedLayer
from .block_recorder import NotAStackError, Stack, find_stack
from .cache import uncut_of
from .sampling import Batch, batch_size
from .svd import OVERSAMPLE
from .task import Layers, Work

DEFAULT_BATCH = 32  # the paper's batch: the default budget is the memory of a training step of this many samples
SAVED_ACTIVATIONS = 3.0  # ratio: what autograd saves for a block, over half its linears' inputs and outputs
EFFICIENCY = 0.7  # ratio: speed of the model, over the speed of its matrix products alone


@dataclass(frozen=True)
class Sizes:
    """Sizes that memory depends on; the maximum over ranks, so that every rank makes the same plan."""

    tokens: int  # tokens of all micro-batches
    largest: int  # tokens of the largest micro-batch
    samples: int  # samples of all micro-batches
    rows: int  # samples of the largest micro-batch
    boundary: int  # bytes per token of the hidden states between blocks
    activations: float  # bytes per token that autograd saves in a training step, without the head
    head: float  # bytes per token of the logits, with their gradient and fp32 copies
    masks: float  # bytes of the attention masks of all micro-batches


def passes(layers: Layers, budget_bytes: float, sum_bytes: Callable[[AdaptedLayer], int]) -> list[Layers]:
    """Return subsets of consecutive layers whose sums fit into a budget, from the last layer to the first."""
    # Backward ends at the lowest layer that has a hook, so a pass over late layers is shorter.
    subsets: list[Layers] = []
    used = 0.0
    for name in reversed(layers):
        size = sum_bytes(layers[name])
        if not subsets or used + size > budget_bytes:
            subsets.append({})
            used = 0.0
        subsets[-1][name] = layers[name]
        used += size
    return subsets


def block_bytes(work: Work, stack: Stack, sizes: Sizes) -> float:
    """Bytes of the largest block's sums and of a block's activations for one micro-batch."""
    largest = max(sum(map(work.sum_bytes, block.values())) for block in stack.targets)
    return largest + sizes.largest * sizes.activations / len(stack.blocks)


def sum_budget(work: Work, sizes: Sizes) -> float:
    """Bytes that the sums of one pass may take: the budget less the activations of a micro-batch."""
    # The default budget is the activation memory of a training step at the paper's batch of 32, or at twice the
    # micro-batch if that is more: whoever can train the model can initialize it.
    per_row = sizes.tokens / sizes.samples * (sizes.activations + sizes.head)
    # A micro-batch of `rows` samples has to fit anyway; twice that leaves the same amount for sums.
    budget = work.options.memory_budget or per_row * max(DEFAULT_BATCH, 2 * sizes.rows)
    return max(0.0, budget - sizes.largest * (sizes.activations + sizes.head))


def measure(work: Work, config: object = None) -> Sizes:
    """Measure the micro-batches and the model; `config` overrides the model's own. A collective."""
    # A rank with an empty share has no micro-batch but still takes part in the reduction.
    counts = [tokens_of(piece.batch) for piece in work.pieces] or [0]
    rows = [batch_size(piece.batch) for piece in work.pieces] or [1]
    first = next(iter(work.layers.values()))
    itemsize, config = first.base.dtype.itemsize, config or getattr(work.model, "config", None)
    # Blocks pass on hidden states; a model without a config is assumed to be as wide as its first target.
    width = getattr(config, "hidden_size", None) or first.in_features
    linears = sum(layer.in_features + layer.out_features for layer in work.layers.values())
    # Only token labels [samples, tokens] come with logits over the vocabulary at every token.
    labels = next((piece.batch.get("labels") for piece in work.pieces), None)
    vocabulary = getattr(config, "vocab_size", 0) if isinstance(labels, Tensor) and labels.dim() == 2 else 0
    head = vocabulary * (2 * itemsize + 8)  # logits and their gradient, and fp32 copies of both in the loss
    masks = sum(mask_bytes(piece.batch, itemsize) for piece in work.pieces)
    every = work.processes.gather_json([sum(counts), max(counts), max(1, sum(rows)), max(rows), head, masks])
    tokens, largest, samples, per_batch, head, masks = map(max, zip(*every, strict=True))
    saved = linears * itemsize * SAVED_ACTIVATIONS / 2
    return Sizes(tokens, largest, samples, per_batch, width * itemsize, saved, head, masks)


def mask_bytes(batch: Batch, itemsize: int) -> float:
    """Bytes of the mask [rows, 1, tokens, tokens] that a model expands from a batch's 2-D mask; 0 without padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return 0.0
    return float(mask.shape[0] * mask.shape[1] ** 2 * itemsize)


def tokens_of(batch: Batch) -> int:
    """Number of tokens of a batch: rows times columns of `input_ids`, or of the tensor with the most dimensions."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    ids = batch.get("input_ids")
    inputs = ids if isinstance(ids, Tensor) else max(tensors, key=lambda t: t.dim(), default=torch.zeros(1))
    return int(inputs.shape[0] * (inputs.shape[1] if inputs.dim() > 1 else 1))


def boundary_bytes(stack: Stack, sizes: Sizes) -> float:
    """Bytes of the inputs of all blocks, of the gradient at one boundary, and of the masks that blocks share."""
    return (len(stack.blocks) + 1) * sizes.tokens * sizes.boundary + sizes.masks


def layerwise_memory(work: Work, stack: Stack, sizes: Sizes) -> float:
    """Peak bytes without boundaries: the maximum of the largest block and the head, which is differentiated first."""
    return max(block_bytes(work, stack, sizes) + factoring_bytes(work), sizes.largest * sizes.head)


def accumulate_memory(work: Work, sizes: Sizes, budget_bytes: float) -> float:
    """Peak bytes: one pass's sums (at most `budget_bytes`, unless one layer takes more) and activations."""
    sums = [work.sum_bytes(layer) for layer in work.layers.values()]
    activations = sizes.largest * (sizes.activations + sizes.head)
    return min(sum(sums), max(budget_bytes, *sums)) + activations + factoring_bytes(work)


def factoring_bytes(work: Work) -> float:
    """Bytes of the largest SVD in fp32: the Gram matrix [s, s], and about three pairs of [m, q] and [n, q] matrices."""
    shapes = [(one.out_features, one.in_features, max(one.r.values()) + OVERSAMPLE) for one in work.layers.values()]
    return max(4 * (min(m, n) ** 2 + 3 * q * (m + n)) for m, n, q in shapes)


def available(device: torch.device) -> float:
    """Free bytes of the device's memory."""
    if device.type == "cuda":
        # Memory that torch's allocator has reserved but not handed out is free for torch; the driver counts it as used.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    return float(psutil.virtual_memory().available)


def product_speed(tokens: int, m: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measured floating point operations per second of x [tokens, n] times W [m, n] transposed."""
    x = torch.zeros(tokens, n, dtype=dtype, device=device)
    w = torch.zeros(m, n, dtype=dtype, device=device)
    best = float("inf")  # best of three: the first one includes warm-up
    for _ in range(3):
        started = time.perf_counter()
        float((x @ w.t())[0, 0])  # reading a value waits for the GPU
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * m * n / best


def gb(size: float) -> str:
    """Format bytes with a decimal unit."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


UNCUT_BYTES = 256e6  # bytes that uncut blocks may take in total: an ordinary machine can spare them, for any model
MIN_BLOCKS = 12  # shortest stack that may have uncut blocks: in shorter ones every boundary is verified


@dataclass(frozen=True)
class InitPlan:
    """A strategy with its estimate."""

    strategy: str  # "layerwise" or "accumulate"
    why: str  # the reason for the strategy, for the report
    stack: Stack | None  # the blocks, for "layerwise"
    on_host: bool  # True if the inputs of blocks are stored in host memory
    sum_budget: float  # bytes that the sums of one pass may take
    memory: float  # peak bytes on top of the model
    uncut: int = 0  # blocks above those of `stack`, differentiated together with the head

    def __str__(self) -> str:
        where = ", boundaries between blocks on the host" if self.on_host else ""
        return f"{self.strategy} ({self.why}{where}): about {gb(self.memory)} above the weights"


def make_plan(work: Work) -> InitPlan:
    """Choose a strategy, and refuse one that does not fit. A collective: every rank makes the same plan."""
    stack, why, strategy = None, "as requested", work.options.strategy
    if strategy != "accumulate":
        try:
            stack = find_stack(work.model, work.layers, work.options.blocks)
            why = f"{len(stack.blocks)} blocks at {stack.name}"
        except NotAStackError as error:
            if strategy == "layerwise":
                raise NotAStackError(f"strategy='layerwise' does not suit this model: {error}. Use 'auto'") from None
            why = str(error)
    try:
        return plan_for(work, stack, why)
    except ValueError:
        if stack is not None and strategy != "layerwise":
            with suppress(ValueError):  # a small budget may hold the sums of some layers, but not all boundaries
                return plan_for(work, None, f"boundaries of {len(stack.blocks)} blocks do not fit")
        raise


def plan_for(work: Work, stack: Stack | None, why: str) -> InitPlan:
    """Make the layerwise plan for a stack, or the accumulate plan for None."""
    sizes = measure(work)
    budget = sum_budget(work, sizes)
    # The minimum over ranks: a plan has to fit on all of them.
    every = work.processes.gather_json([available(work.device), float(psutil.virtual_memory().available)])
    free, host = map(min, zip(*every, strict=True))
    if stack is None:
        count = len(passes(work.layers, budget, work.sum_bytes))
        memory = accumulate_memory(work, sizes, budget)
        _refuse_too_much(work, sizes, memory, free, None)
        return InitPlan("accumulate", f"{why}; {count} passes", None, False, budget, memory)
    boundaries = boundary_bytes(stack, sizes)
    block_memory = layerwise_memory(work, stack, sizes)
    limit = min(free, work.options.memory_budget or free)
    # Boundaries go to the host only if they do not fit: copies over PCIe are slower than the device's memory.
    on_host = work.device.type != "cpu" and boundaries + block_memory > limit and boundaries < host
    memory = block_memory + (0 if on_host else boundaries)
    _refuse_too_much(work, sizes, memory, limit, stack)
    per_block = block_bytes(work, stack, sizes)
    # A resumed run uses the same number of uncut blocks as before; runs on several ranks do not resume.
    uncut = None if work.processes.is_distributed else uncut_of(work.options.cache)
    if uncut is None or uncut >= len(stack.blocks) - stack.lowest:  # or for another model, whose cache is then refused
        uncut = uncut_blocks(work, stack, min(memory, UNCUT_BYTES, limit - memory, budget), per_block)
    if uncut:
        why, end = f"{why}, of which the last {uncut} together", len(stack.blocks) - uncut
        stack = Stack(stack.name, stack.blocks[:end], stack.targets[:end])
    return InitPlan("layerwise", why, stack, on_host, budget, memory + uncut * per_block, uncut)


def uncut_blocks(work: Work, stack: Stack, spare_bytes: float, per_block: float) -> int:
    """Return how many blocks at the top are differentiated in the first backward instead of being recomputed."""
    # Recomputation takes a fifth of the time (measured on SmolLM2-135M, two Zen 3 cores). The caller limits
    # `spare_bytes` to the memory of everything else and to UNCUT_BYTES, so that memory does not grow with the number of
    # blocks. 0 if there are several ranks, which would have to agree on the number, or if a base layer has to run its
    # own forward (sharded or offloaded weights that are present only during it).
    runs_itself = any(layer.base.must_run() for layer in work.layers.values())
    if len(stack.blocks) < MIN_BLOCKS or work.processes.is_distributed or runs_itself:
        return 0
    return max(0, min(int(spare_bytes / per_block), len(stack.blocks) - 1 - stack.lowest))


def _refuse_too_much(work: Work, sizes: Sizes, memory: float, limit: float, stack: Stack | None) -> None:
    """Raise a ValueError that suggests smaller batches or fewer samples, if `memory` is above `limit`."""
    if memory <= limit:
        return
    # The least memory that this strategy needs: batches of one sample, and one layer's sum per pass. Boundaries
    # of all samples are stored at the same time, so they do not shrink with the batch size.
    single = replace(sizes, largest=-(-sizes.largest // sizes.rows), rows=1)
    if stack is None:
        alone, boundaries = accumulate_memory(work, single, 0.0), 0.0
    else:
        alone, boundaries = layerwise_memory(work, stack, single), boundary_bytes(stack, sizes)
    advice = []
    if sizes.rows > 1 and alone + boundaries <= limit:
        advice.append(f"batches of one sample ({gb(alone + boundaries)})")
    samples = int((limit - alone) / boundaries * sizes.samples) if boundaries else 0
    if 0 < samples < sizes.samples:
        advice.append(f"num_samples={samples} in batches of one")
    if stack is None:
        advice.append("strategy='layerwise', if the model is a stack of blocks")
    raise ValueError(
        f"initialization needs about {gb(memory)} above the weights and {gb(limit)} are available. What would fit: "
        + ("; ".join(advice) or "shorter samples, or fewer target_modules")
        + ". Nothing was changed"
    )
