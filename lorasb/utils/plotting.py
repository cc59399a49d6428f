"""Shared parts of all plots: import of matplotlib at first use, colors, and atomic writing of the PNG."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from .atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Text; secondary lines; series of sign(G); series of the gradient G.
INK, MUTED, SIGN, GRAD = "#1b1b1b", "#8a8a8a", "#3568b8", "#d9822b"


def installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def canvas() -> tuple[Figure, Axes]:
    """Return a figure of the README's width and its axes; without matplotlib, an ImportError gives the pip command."""
    try:
        from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lorasb[demo]'") from error
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    return figure, figure.subplots()


def save(figure: Figure, axes: Axes, title: str, path: str | os.PathLike[str]) -> None:
    """Title the figure and write it to `path` as a PNG, atomically."""
    axes.set_title(title, parse_math=False, fontsize=11, color=INK)  # a file name may have two dollar signs
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
