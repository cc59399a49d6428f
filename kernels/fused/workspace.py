"""Counters of arriving programs: zero whenever no kernel runs, because the last program to come resets its own."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros, int32, that no other stream uses.

    Kept for the default stream. Another stream gets zeros of its own at every call: it may belong to a graph that is
    being captured, or warmed up in a memory pool which nothing else may live in.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or _beside(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device not in _counters or _counters[device].numel() < count:
        _counters[device] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
    return _counters[device]


def _beside(device: torch.device) -> bool:
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def forget() -> None:
    """Drop every counter: after a launch failed, one may be left above zero."""
    _counters.clear()
