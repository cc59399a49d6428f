"""The picture of many adapters: memory by number of adapters, and tokens per second of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.figures import panels, save_panels
from benchmarks.serving.economics import draw_totals
from lorasb.utils.plotting import INK, MUTED, SIGN


def draw(tokens: Mapping[str, float], path: Path) -> None:
    """Draw bytes by the number of adapters, and tokens per second by way; the first is the peer's."""
    figure, (memory, speed) = panels(1, 2, (10, 3.6))
    draw_totals(memory, "SmolLM2-135M")
    memory.legend(fontsize=8, frameon=False)
    speed.barh(list(tokens), list(tokens.values()), color=[MUTED, *[SIGN] * (len(tokens) - 1)])
    for i, value in enumerate(tokens.values()):
        speed.text(value, i, f" {value:.0f}", va="center", fontsize=8, color=INK)
    speed.set_xlabel("tokens per second of the batch")
    speed.set_title("Decoding 64 rows on two cores", fontsize=10, color=INK)
    save_panels(figure, [memory, speed], path)
