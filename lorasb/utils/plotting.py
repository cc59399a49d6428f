"""What all pictures share: matplotlib at first use, the colors, and files that are whole or not there."""

from __future__ import annotations

import os
from typing import Any

from .atomic_files import replacing

INK, MUTED, SIGN, GRAD = "#1b1b1b", "#8a8a8a", "#3568b8", "#d9822b"


def canvas() -> tuple[Any, Any]:
    """A figure of README width and its axes.

    Raises:
        ImportError: matplotlib is missing; the message has the pip command.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lorasb[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(9, 4.2), layout="constrained")


def save(figure: Any, axes: Any, title: str, path: str | os.PathLike[str]) -> None:
    """Title the figure and write it to `path` as a PNG, atomically."""
    import matplotlib.pyplot as plt

    axes.set_title(title, fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    plt.close(figure)
