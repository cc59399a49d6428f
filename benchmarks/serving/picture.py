"""The picture of many adapters: memory by their number, and tokens per second of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.figures import panels, save_panels
from lorasb.utils.plotting import GRAD, INK, MUTED, SIGN

COUNTS = (1, 10, 100, 1000)


def draw(sizes: Mapping[str, float], tokens: Mapping[str, float], path: Path) -> None:
    """Draw bytes of one adapter, by kind, and tokens per second, by way; the first of each is the peer's."""
    figure, (memory, speed) = panels(1, 2, (10, 3.6))
    for (label, size), color in zip(sizes.items(), (MUTED, GRAD, SIGN), strict=False):
        memory.loglog(COUNTS, [count * size / 1e6 for count in COUNTS], "o-", color=color, label=label)
    memory.set_xlabel("adapters")
    memory.set_ylabel("MB")
    memory.set_title("Memory of adapters, SmolLM2-135M", fontsize=10, color=INK)
    memory.legend(fontsize=8, frameon=False)
    speed.barh(list(tokens), list(tokens.values()), color=[MUTED, *[SIGN] * (len(tokens) - 1)])
    for i, value in enumerate(tokens.values()):
        speed.text(value, i, f" {value:.0f}", va="center", fontsize=8, color=INK)
    speed.set_xlabel("tokens per second of the batch")
    speed.set_title("Decoding 64 rows on two cores", fontsize=10, color=INK)
    save_panels(figure, [memory, speed], path)
