"""Estimates of an initialization's memory and time, from which `plan` chooses.

Memory is counted on top of the model, in bytes, from shapes. Time comes from the speed of one matrix product of the
model's own size, which is measured when it is asked for.
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

DEFAULT_BATCH = 32  # the paper's batch: the default budget is the memory of a training step of this many samples
SAVED_ACTIVATIONS = 3.0  # ratio: what autograd saves of a block, over half the inputs and outputs of its linears
EFFICIENCY = 0.7  # ratio: speed of a whole model, over that of its products alone


@dataclass(frozen=True)
class Sizes:
    """Sizes that memory and time depend on; the maximum over ranks, so that every rank makes the same plan.

    Attributes:
        tokens: tokens of all micro-batches.
        largest: tokens of the largest micro-batch.
        samples: samples of all micro-batches.
        rows: samples of the largest micro-batch.
        width: features of the hidden states between blocks.
        itemsize: bytes of an activation.
        activations: bytes that autograd saves of one token in a training step, without the head.
        head: bytes of the logits of one token, with their gradient and fp32 copies.
        masks: bytes of the attention masks of all micro-batches.
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
    """Bytes of the largest block's sums and its activations of one micro-batch."""
    largest = max(sum(sum_bytes(layer, work.sketch_rank) for layer in block.values()) for block in stack.targets)
    return largest * (2 if work.halves else 1) + sizes.largest * sizes.activations / len(stack.blocks)


def sum_budget(work: Work, sizes: Sizes, memory_budget: float | None) -> float:
    """Bytes that the sums of one pass may take: the budget less the activations of a micro-batch.

    The default budget is the activation memory of a training step at the paper's batch of 32, or at twice the
    micro-batch if that is more: who can train the model can initialize it.
    """
    per_row = sizes.tokens / sizes.samples * (sizes.activations + sizes.head)
    # A micro-batch of `rows` samples has to fit anyway; twice that leaves as much for sums.
    budget = memory_budget if memory_budget is not None else per_row * max(DEFAULT_BATCH, 2 * sizes.rows)
    return max(0.0, budget - sizes.largest * (sizes.activations + sizes.head))


def measure(work: Work) -> Sizes:
    """Measure the micro-batches and the model; a collective."""
    # A rank with an empty share has no micro-batch, and takes part in the reduction all the same.
    counts = [tokens_of(piece.batch) for piece in work.pieces] or [0]
    rows = [batch_size(piece.batch) for piece in work.pieces] or [1]
    first = next(iter(work.layers.values()))
    itemsize = first.base_dtype.itemsize
    config = getattr(work.model, "config", None)
    # Blocks pass on hidden states; a model without a config is taken to be as wide as its first target.
    width = getattr(config, "hidden_size", None) or first.in_features
    saved = (
        sum(layer.in_features + layer.out_features for layer in work.layers.values()) * itemsize * SAVED_ACTIVATIONS / 2
    )
    # Only token labels [samples, tokens] come with logits over the vocabulary at every token.
    labels = next((piece.batch.get("labels") for piece in work.pieces), None)
    vocabulary = getattr(config, "vocab_size", 0) if isinstance(labels, Tensor) and labels.dim() == 2 else 0
    head = vocabulary * (2 * itemsize + 8)  # logits and their gradient, and fp32 copies of both in the loss
    masks = sum(mask_bytes(piece.batch, itemsize) for piece in work.pieces)
    maxima = work.processes.all_reduce_max([sum(counts), max(counts), max(1, sum(rows)), max(rows), head, masks])
    # Floats after the reduction, and exact below 2^53.
    tokens, largest, samples, per_batch = map(int, maxima[:4])
    return Sizes(tokens, largest, samples, per_batch, width, itemsize, saved, *maxima[4:])


def mask_bytes(batch: Mapping[str, Any], itemsize: int) -> float:
    """Bytes of the mask [rows, 1, tokens, tokens] that a model expands from a batch's 2-D mask; 0 without padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return 0.0
    return float(mask.shape[0] * mask.shape[1] ** 2 * itemsize)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Number of tokens of a batch: rows times columns of `input_ids`, or of the tensor with most dimensions."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    ids = batch.get("input_ids")
    inputs = ids if isinstance(ids, Tensor) else max(tensors, key=lambda t: t.dim(), default=torch.zeros(1))
    return int(inputs.shape[0] * (inputs.shape[1] if inputs.dim() > 1 else 1))


def boundary_bytes(stack: Stack, sizes: Sizes) -> float:
    """Bytes of the inputs of all blocks, of the gradient at one boundary, and of the masks that blocks share."""
    return (len(stack.blocks) + 1) * sizes.tokens * sizes.width * sizes.itemsize + sizes.masks


def layerwise_memory(work: Work, stack: Stack, sizes: Sizes) -> float:
    """Peak bytes without boundaries: of the largest block, or of the head, which is differentiated before it."""
    return max(block_bytes(work, stack, sizes) + factoring_bytes(work), sizes.largest * sizes.head)


def accumulate_memory(work: Work, sizes: Sizes, budget_bytes: float) -> float:
    """Peak bytes: sums of one pass, at most `budget_bytes` unless one layer takes more, and activations."""
    all_sums = sum(sum_bytes(layer, work.sketch_rank) for layer in work.layers.values()) * (2 if work.halves else 1)
    largest = max(sum_bytes(layer, work.sketch_rank) for layer in work.layers.values())
    return (
        min(all_sums, max(budget_bytes, largest))
        + sizes.largest * (sizes.activations + sizes.head)
        + factoring_bytes(work)
    )


def factoring_bytes(work: Work) -> float:
    """Bytes of the SVD of the largest layer."""
    return max(map(_factoring_bytes, work.layers.values()))


def _factoring_bytes(layer: LoRASBLinear) -> float:
    """Bytes of one SVD in fp32: the Gram matrix [s, s], and about three pairs of thin matrices [m, q] and [n, q]."""
    m, n = layer.out_features, layer.in_features
    return 4 * (min(m, n) ** 2 + 3 * (max(layer.r.values()) + OVERSAMPLE) * (m + n))


def available(device: torch.device) -> float:
    """Free bytes of the device's memory."""
    if device.type == "cuda":
        # What torch's allocator has reserved and not given out is free for torch, and used in the driver's count.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    return float(psutil.virtual_memory().available)


def seconds(work: Work, sizes: Sizes, products: int) -> float:
    """Estimated duration of the backward passes and of the SVDs.

    Args:
        work: model and samples.
        sizes: their sizes.
        products: floating point operations per weight and token; 2 each for a forward, the gradient of the input, the
            gradient of the weight, and a recomputation.
    """
    layers = list(work.layers.values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    # The vocabulary's size, from the bytes of its logits. The head is not recomputed by any strategy: 6 operations.
    head = sizes.head and sizes.width * sizes.head / (2 * sizes.itemsize + 8)
    work_flops = products * sizes.tokens * weights + 6 * sizes.tokens * head
    # Two products of [m, n] by [n, q] in each iteration of the SVD, 2 operations each.
    factoring = sum(4 * ITERATIONS * n.in_features * n.out_features * (max(n.r.values()) + OVERSAMPLE) for n in layers)
    return (
        work_flops / _speed(work, layers[0], sizes) + factoring / _speed(work, layers[0], sizes, torch.float32)
    ) / EFFICIENCY


def _speed(work: Work, layer: LoRASBLinear, sizes: Sizes, dtype: torch.dtype | None = None) -> float:
    """Floating point operations per second of x Wᵀ with the tokens of a micro-batch, limited to [16, 512]."""
    tokens, m, n = max(16, min(512, sizes.largest)), layer.out_features, layer.in_features
    kind = dtype or layer.base_dtype
    return product_speed(tokens, m, n, kind, work.device)


def product_speed(tokens: int, m: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measured floating point operations per second of x [tokens, n] times W [m, n] transposed."""
    x = torch.zeros(tokens, n, dtype=dtype, device=device)
    w = torch.zeros(m, n, dtype=dtype, device=device)
    best = float("inf")  # of three: the first one includes warm-up
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
