"""Dropout's masks for the kernels: a probability, and seeds as numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..eager import linear as eager


class CaptureError(RuntimeError):
    """Error of a call that cannot be captured in a CUDA graph."""


@cache
def _no_mask() -> Any:
    from lorasb.kernels.operands import Mask

    return Mask()


def mask_of(dropout: float, seeds: Tensor | None) -> Any:
    """The masks' probability, and their seeds as numbers.

    Raises:
        CaptureError: a CUDA graph is being captured, which would replay the same mask.
    """
    if seeds is None or dropout <= 0.0:
        return _no_mask()
    from lorasb.kernels.operands import Mask

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "lora_dropout under CUDA graph capture would repeat one mask at every replay: set lora_dropout=0, or call "
            "model.eval(), before capturing"
        )
    return Mask(eager.kernel_dropout(dropout), tuple(seeds.tolist()))
