"""What an initialization takes in time and memory.

Memory is what comes on top of the model. Figures are estimates from shapes; time is from the speed of one product of
the model's own size, measured on the spot.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from ..linalg.svd import ITERATIONS, OVERSAMPLE
from ..sampling import batch_size
from .block_stack import Stack
from .task import Work
from .whole_model import sum_bytes

PAPER_BATCH = 32  # samples of a training step that a default budget allows for
SAVED = 3.0  # bytes that autograd keeps of a block, over the inputs and outputs of its linears
SPEED = 0.7  # of a model's products, against one product alone


@dataclass(frozen=True)
class Sizes:
    """What decides memory and time.

    Attributes:
        tokens: of all micro-batches; largest: of the largest one; samples, rows: likewise.
        width: features of the boundary between blocks. itemsize: bytes of an activation.
        activations: bytes that a training step keeps of one token, without the head.
        head: bytes that the logits of one token take, with their gradient and fp32 copies.
        masks: bytes of the attention masks of all micro-batches.

    The largest of any process, so that all of them plan alike.
    """

    tokens: int
    largest: int
    samples: int
    rows: int
    width: int
    itemsize: int
    activations: float
    head: float
    masks: float


def block_bytes(work: Work, stack: Stack, sizes: Sizes) -> float:
    """The largest block's sums, and its activations of one micro-batch."""
    sums = max(sum(sum_bytes(layer) for layer in block.values()) for block in stack.targets) * (2 if work.halves else 1)
    return sums + sizes.largest * sizes.activations / len(stack.blocks)


def sum_room(work: Work, sizes: Sizes, memory_budget: float | None) -> float:
    """Bytes for the sums of one pass: what a budget leaves beside the activations of a micro-batch.

    The default budget is what a training step of the same model needs at the paper's batch of 32, or at twice the
    micro-batch where that is more.
    """
    per_row = sizes.tokens / sizes.samples * (sizes.activations + sizes.head)
    budget = memory_budget if memory_budget is not None else per_row * max(PAPER_BATCH, 2 * sizes.rows)
    return max(0.0, budget - sizes.largest * (sizes.activations + sizes.head))


def measure(work: Work) -> Sizes:
    """Sizes of a piece of work."""
    counts = [tokens_of(piece.batch) for piece in work.pieces] or [0]
    rows = [batch_size(piece.batch) for piece in work.pieces] or [1]
    first = next(iter(work.layers.values()))
    itemsize = first.base_dtype.itemsize
    config = getattr(work.model, "config", None)
    width = getattr(config, "hidden_size", None) or first.in_features
    saved = sum(layer.in_features + layer.out_features for layer in work.layers.values()) * itemsize * SAVED / 2
    labels = next((piece.batch.get("labels") for piece in work.pieces), None)
    vocabulary = getattr(config, "vocab_size", 0) if isinstance(labels, Tensor) and labels.dim() == 2 else 0
    head = vocabulary * (2 * itemsize + 8)
    masks = sum(mask_bytes(piece.batch, itemsize) for piece in work.pieces)
    most = work.processes.all_reduce_max([sum(counts), max(counts), max(1, sum(rows)), max(rows), head, masks])
    tokens, largest, samples, per_batch = map(int, most[:4])
    return Sizes(tokens, largest, samples, per_batch, width, itemsize, saved, *most[4:])


def mask_bytes(batch: Mapping[str, Any], itemsize: int) -> float:
    """Of the masks [rows, 1, tokens, tokens] that models make where something is padded."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return 0.0
    return float(mask.shape[0] * mask.shape[1] ** 2 * itemsize)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch: rows times columns of its ids, or of its first tensor."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    ids = batch.get("input_ids")
    found = ids if isinstance(ids, Tensor) else max(tensors, key=lambda t: t.dim(), default=torch.zeros(1))
    return int(found.shape[0] * (found.shape[1] if found.dim() > 1 else 1))


def boundary_bytes(stack: Stack, sizes: Sizes) -> float:
    """Inputs of all blocks, the gradient at one boundary, and what blocks share beside them."""
    return (len(stack.blocks) + 1) * sizes.tokens * sizes.width * sizes.itemsize + sizes.masks


def layerwise_memory(work: Work, stack: Stack, sizes: Sizes) -> float:
    """The largest block's sums and activations, or the head's; boundaries not counted."""
    return max(block_bytes(work, stack, sizes) + factoring_bytes(work), sizes.largest * sizes.head)


def accumulate_memory(work: Work, sizes: Sizes, room: float) -> float:
    """Sums of one pass and activations of one micro-batch."""
    every = sum(sum_bytes(layer) for layer in work.layers.values()) * (2 if work.halves else 1)
    largest = max(sum_bytes(layer) for layer in work.layers.values())
    return min(every, max(room, largest)) + sizes.largest * (sizes.activations + sizes.head) + factoring_bytes(work)


def factoring_bytes(work: Work) -> float:
    """Of the largest layer: its Gram matrix and a few thin matrices."""
    return max(map(_factoring_bytes, work.layers.values()))


def _factoring_bytes(layer: LoRASBLinear) -> float:
    m, n = layer.out_features, layer.in_features
    return 4 * (min(m, n) ** 2 + 3 * (max(layer.r.values()) + OVERSAMPLE) * (m + n))


def available(device: torch.device) -> float:
    """Bytes that are free where the model runs."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    return float(psutil.virtual_memory().available)


def seconds(work: Work, sizes: Sizes, products: int) -> float:
    """From the speed of one product: forward, recomputation, two gradients; then the factoring."""
    layers = list(work.layers.values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    head = sizes.head and sizes.width * sizes.head / (2 * sizes.itemsize + 8)
    work_flops = products * sizes.tokens * weights + 6 * sizes.tokens * head
    factoring = sum(4 * ITERATIONS * n.in_features * n.out_features * (max(n.r.values()) + OVERSAMPLE) for n in layers)
    return (
        work_flops / _speed(work, layers[0], sizes) + factoring / _speed(work, layers[0], sizes, torch.float32)
    ) / SPEED


def _speed(work: Work, layer: LoRASBLinear, sizes: Sizes, dtype: torch.dtype | None = None) -> float:
    """Floating point operations a second of x Wᵀ, with as many tokens as a micro-batch has."""
    tokens, m, n = max(16, min(512, sizes.largest)), layer.out_features, layer.in_features
    kind = dtype or layer.base_dtype
    x = torch.zeros(tokens, n, dtype=kind, device=work.device)
    w = torch.zeros(m, n, dtype=kind, device=work.device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((x @ w.t())[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * m * n / best


def gb(size: float) -> str:
    """Bytes for people."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"
