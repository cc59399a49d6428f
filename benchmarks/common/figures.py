"""Pictures of several panels, in one style, written atomically."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasb.utils.atomic_files import replacing


def panels(down: int, across: int, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row; options go to `pyplot.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False, **options)
    return figure, list(axes.flat)


def save_panels(figure: Any, axes: Sequence[Any], path: Path, dpi: int = 140, grid: bool = True) -> None:
    """Write a PNG."""
    from matplotlib import pyplot

    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        if grid:
            one.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot.close(figure)
