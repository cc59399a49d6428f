"""Cards by name: their memory and speed, from their makers' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        title: its full name.
        memory: bytes.
        flops: of dense products a second: of bf16 with sums in fp32, or of fp32 where there is no bf16.
        bf16: whether it multiplies bf16, as cards from compute capability 8.0 on do.
    """

    title: str
    memory: int
    flops: float
    bf16: bool = True


def _card(title: str, gib: float, teraflops: float) -> Card:
    return Card(title, int(gib * GIB), teraflops * 1e12)


CARDS = {
    "t4": Card("NVIDIA T4", 16 * GIB, 8.1e12, bf16=False),
    "l4": _card("NVIDIA L4", 24, 121),
    "a10": _card("NVIDIA A10", 24, 125),
    "a30": _card("NVIDIA A30", 24, 165),
    "a40": _card("NVIDIA A40", 48, 150),
    "l40s": _card("NVIDIA L40S", 48, 362),
    "a4000": _card("NVIDIA RTX A4000", 16, 77),
    "a5000": _card("NVIDIA RTX A5000", 24, 111),
    "a6000": _card("NVIDIA RTX A6000", 48, 155),
    "6000ada": _card("NVIDIA RTX 6000 Ada", 48, 364),
    "3060": _card("NVIDIA GeForce RTX 3060", 12, 25),
    "3080": _card("NVIDIA GeForce RTX 3080", 10, 60),
    "3090": _card("NVIDIA GeForce RTX 3090", 24, 71),
    "4060ti": _card("NVIDIA GeForce RTX 4060 Ti 16GB", 16, 44),
    "4070": _card("NVIDIA GeForce RTX 4070", 12, 58),
    "4080": _card("NVIDIA GeForce RTX 4080", 16, 97),
    "4090": _card("NVIDIA GeForce RTX 4090", 24, 165),
    "5090": _card("NVIDIA GeForce RTX 5090", 32, 209),
    "a100": _card("NVIDIA A100 40GB", 40, 312),
    "a100-80": _card("NVIDIA A100 80GB", 80, 312),
    "h100": _card("NVIDIA H100 SXM", 80, 989),
    "h200": _card("NVIDIA H200", 141, 989),
    "b200": _card("NVIDIA B200", 180, 2250),
}


def find(name: str) -> Card:
    """A card by its short name, however it is written ("RTX A6000", "a6000", "A100-80GB").

    Raises:
        ValueError: no such card; the message has the nearest names.
    """
    compact = {known.replace("-", ""): known for known in CARDS}
    key = re.sub(r"nvidia|geforce|rtx|quadro|gb|sxm|pcie|[^a-z0-9]", "", name.lower())
    if key in compact:
        return CARDS[compact[key]]
    near = difflib.get_close_matches(key, compact, n=3, cutoff=0.4) or list(compact)
    raise ValueError(f"--gpu {name!r} is not known: did you mean {' or '.join(compact[one] for one in near)}?")
