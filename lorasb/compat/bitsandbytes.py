"""bitsandbytes' packed layout for its CPU kernel: prevent the repacking, or revert it where that is lossless."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import Private

VERIFIED = "bitsandbytes 0.50"
PRIVATE = {
    "supports_repacking": Private(
        "bitsandbytes.nn.Linear4bit().support_avx512bf16_for_cpu",
        "set to False: an evaluation on a CPU with bf16 would repack the weight",
        "training raises after an evaluation by bitsandbytes",
    ),
    "packing_format": Private(
        "bitsandbytes.functional.QuantState().packing_format_for_cpu",
        "detects a repacked weight, by its `original_*` attributes",
        "a repacked weight is refused: patch before the first evaluation",
    ),
}
REPACKED_ROWS = 32  # rows that bitsandbytes interleaves for its CPU kernel: `block_n` of its conversion


@torch.no_grad()
def unpack_repacked(weight: Any, state: Any) -> None:
    """Revert bitsandbytes' repacking for CPUs with bf16, in place; a ValueError if its scales were rounded."""
    # The repacking interleaves the nibbles of 32 rows and rounds the scales to bf16: lossless only for bf16 numbers,
    # such as the largest element of a block of bf16 weights, not for scales computed from nested statistics.
    if state.original_nested or state.original_dtype != torch.bfloat16:
        what = "its nested statistics" if state.original_nested else f"the scales of its {state.original_dtype}"
        raise ValueError(
            f"bitsandbytes repacked this 4-bit weight for its CPU kernel, and {what} were rounded to bf16, which "
            "cannot be undone: load the model again, and patch it before the first evaluation"
        )
    rows, columns = (int(size) for size in state.shape)
    # A line of 32 bytes has 64 nibbles of 32 rows and two columns, [32 rows, 2]: the first 32 are the low nibbles of
    # its bytes, the others the high ones.
    interleaved = weight.data.reshape(-1, REPACKED_ROWS)
    nibbles = torch.cat((interleaved & 15, interleaved >> 4), dim=-1)
    nibbles = nibbles.view(rows // REPACKED_ROWS, columns // 2, REPACKED_ROWS, 2).transpose(1, 2).reshape(-1, 2)
    packed = ((nibbles[:, 0] << 4) | nibbles[:, 1]).view(torch.uint8)
    storage = getattr(state, "original_storage_type", None)
    packed = packed if storage is None else packed.view(storage)
    weight.data = packed.reshape(state.original_qshape)
    # The repacked scales are [columns / block, rows].
    state.absmax = state.absmax.t().contiguous().float().reshape(-1)
    state.dtype, state.nested, state.state2 = state.original_dtype, False, None
    state.packing_format_for_cpu = False


def keep_unpacked(model: nn.Module) -> None:
    """Switch off bitsandbytes' repacking for all 4-bit layers of a model, before a CPU evaluation repacks them."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # read in `Linear4bit.forward`
