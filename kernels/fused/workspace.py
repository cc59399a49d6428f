"""Counters of the programs that share a sum (split-K), reused by every launch without a memset.

A counter is zero whenever no kernel runs: the last program to increment it resets it (`arrives_last`). Launches of one
stream do not overlap, so that one tensor serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros, int32, that no other stream uses.

    Cached for the default stream. Another stream gets zeros of its own at every call: it may belong to a graph that is
    being captured, or warmed up in a memory pool which nothing else may live in.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or _on_side_stream(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device not in _counters or _counters[device].numel() < count:
        # at least 4096, and twice what is asked for: growth reallocates a logarithmic number of times
        _counters[device] = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
    return _counters[device]


def _on_side_stream(device: torch.device) -> bool:
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def forget() -> None:
    """Drop every counter: after a launch failed, one may be left above zero."""
    _counters.clear()
