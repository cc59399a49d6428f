"""bitsandbytes' own layout for its CPU kernel: kept away, or converted back where that loses nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

REPACKED_ROWS = 32  # bitsandbytes interleaves so many rows for its CPU kernel


@torch.no_grad()
def unpack_repacked(weight: Any, state: Any) -> None:
    """Undo what one evaluation by bitsandbytes does to a weight on CPUs with bf16 instructions, in place.

    It interleaves the nibbles of 32 rows, which is undone exactly, and rounds the scales to bf16, which loses nothing
    only where they were bf16 numbers: the largest of a block of bf16 weights is one, a nested scale is not.

    Raises:
        ValueError: the scales were rounded; the model has to be loaded again.
    """
    if state.original_nested or state.original_dtype != torch.bfloat16:
        why = (
            "its nested statistics were" if state.original_nested else f"the scales of its {state.original_dtype} were"
        )
        raise ValueError(
            f"bitsandbytes repacked this 4-bit weight for its CPU kernel, and {why} rounded to bf16, which cannot be "
            "undone: load the model again, and patch it before the first evaluation"
        )
    rows, columns = (int(size) for size in state.shape)
    mixed = weight.data.reshape(-1, REPACKED_ROWS)
    nibbles = torch.cat((mixed & 15, mixed >> 4), dim=-1)
    nibbles = nibbles.view(rows // REPACKED_ROWS, columns // 2, REPACKED_ROWS, 2).transpose(1, 2).reshape(-1, 2)
    octets = ((nibbles[:, 0] << 4) | nibbles[:, 1]).view(torch.uint8)
    storage = getattr(state, "original_storage_type", None)
    octets = octets if storage is None else octets.view(storage)
    weight.data = octets.reshape(state.original_qshape)
    state.absmax = state.absmax.t().contiguous().float().reshape(-1)
    state.dtype, state.nested, state.state2 = state.original_dtype, False, None
    state.packing_format_for_cpu = False


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking any 4-bit weight of a model at its next evaluation on a CPU."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # bitsandbytes' own switch
