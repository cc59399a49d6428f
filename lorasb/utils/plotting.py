"""Shared parts of all plots: import of matplotlib at first use, colors, and atomic writing of the PNG."""

from __future__ import annotations

import os
from typing import Any

from .atomic_files import replacing

# Text; secondary lines; series of sign(G); series of the gradient G.
INK, MUTED, SIGN, GRAD = "#1b1b1b", "#8a8a8a", "#3568b8", "#d9822b"


def canvas() -> tuple[Any, Any]:
    """A figure of the README's width, and its axes.

    Raises:
        ImportError: matplotlib is not installed; the message has the pip command.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lorasb[demo]'") from error
    matplotlib.use("Agg")  # draws into files; other backends may need a display
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(9, 4.2), layout="constrained")


def save(figure: Any, axes: Any, title: str, path: str | os.PathLike[str]) -> None:
    """Title the figure and write it to `path` as a PNG, atomically."""
    import matplotlib.pyplot as plt

    axes.set_title(title, fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    plt.close(figure)  # pyplot keeps figures alive until they are closed
