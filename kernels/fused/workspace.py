"""Counters of arriving programs: zero whenever no kernel runs, because the last program to arrive resets its own."""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[torch.device, Tensor] = {}  # of each device's default stream


def counters(device: torch.device, count: int) -> Tensor:
    """Return at least `count` zeros, int32, that no other stream uses at the same time.

    The default stream's are reused. Another stream gets new ones in each call, and so does a capture: a replay must not
    share counters with other work that runs at the same time.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            if device not in _kept or _kept[device].numel() < count:
                _kept[device] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
            return _kept[device]
    return torch.zeros(count, dtype=torch.int32, device=device)


def forget() -> None:
    """Drop every counter: after a failed launch, one may be above zero."""
    _kept.clear()
