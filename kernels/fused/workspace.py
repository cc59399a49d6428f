"""Counters of arriving programs: zero whenever no kernel runs, because the last program to come resets its own."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros, int32, that no other stream uses; under capture a graph gets its own."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
    return _counters[key]


def forget() -> None:
    """Drop every counter: after a launch failed, one may be left above zero."""
    _counters.clear()
