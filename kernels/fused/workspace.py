"""Counters of arriving programs: zero whenever no kernel runs, because the last program to arrive resets its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SIDE_STREAMS, SIDE_COUNTERS = 16, 16384  # of a device: 1 MB


@dataclass
class Bank:
    """Counters of one device."""

    own: Tensor  # of the default stream; grows
    side: Tensor  # [SIDE_STREAMS, SIDE_COUNTERS] for other streams, made with `own` and never again
    rows: dict[int, int] = field(default_factory=dict)  # stream -> its row of `side`


_banks: dict[torch.device, Bank] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros, int32, that no other stream uses at the same time.

    They are allocated on the default stream alone: another stream may be warming up a graph in a memory pool that
    nothing else may live in. Another stream gets a row that was allocated then, and its own zeros at every call
    only before the default stream has been used, when rows run out, or where it is being captured: a replay must not
    share counters with what runs at the same time.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    bank = _banks.get(device)
    if stream == default:
        if bank is None:
            side = torch.zeros((SIDE_STREAMS, SIDE_COUNTERS), dtype=torch.int32, device=device)
            bank = _banks[device] = Bank(side[0, :0], side)
        if bank.own.numel() < count:
            bank.own = torch.zeros(max(4096, 2 * count), dtype=torch.int32, device=device)
        return bank.own
    if bank is None or count > SIDE_COUNTERS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if stream.cuda_stream not in bank.rows:
        if len(bank.rows) == SIDE_STREAMS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream.wait_stream(default)  # the row was zeroed there
        bank.rows[stream.cuda_stream] = len(bank.rows)
    return bank.side[bank.rows[stream.cuda_stream]]


def forget() -> None:
    """Drop every counter: after a launch failed, one may be left above zero."""
    _banks.clear()
