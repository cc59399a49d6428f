"""The README's picture: megabytes of one adapter among a thousand of Mistral-7B, the shared basis included.

python -m benchmarks.research.reporting.front   # docs/megabytes-light.png and docs/megabytes-dark.png
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.figures import panels, save_panels
from benchmarks.research.methods import runner
from benchmarks.serving.economics import Sizes
from lorasb.utils.plotting import MUTED, SIGN

DOCS = runner.RESULTS.parents[1] / "docs"
INKS = {"light": "#1b1b1b", "dark": "#e6e6e6"}  # of text, on either background
MODEL, RANK, COUNT = "Mistral-7B", 16, 1000


def draw(path: Path, ink: str) -> None:
    """Write the picture on a transparent background; legible on a telephone."""
    sizes = Sizes(MODEL)
    bars = {
        "LoRA, r = 32": sizes.lora(32) / 1e6,
        "LoRA, r = 1": sizes.lora(1) / 1e6,
        f"R on a shared basis,\nr = {RANK}": sizes.on_basis(RANK, COUNT) / COUNT / 1e6,
    }
    figure, (axis,) = panels(1, 1, (7.6, 3.0))
    axis.barh(list(bars), list(bars.values()), color=[MUTED, MUTED, SIGN], height=0.62)
    axis.set_xscale("log")
    axis.set_xlim(0.1, 6000)
    for i, value in enumerate(bars.values()):
        text = f" {value:.0f} MB" if value > 100 else f" {value:.1f} MB"
        axis.text(value, i, text, va="center", fontsize=19, fontweight="bold", color=ink)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=17, labelcolor=ink, length=0)
    axis.xaxis.set_visible(False)
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.set_title(f"One of {COUNT:,} adapters of {MODEL} (log scale)", fontsize=18, color=ink)
    figure.patch.set_alpha(0)
    axis.patch.set_alpha(0)
    save_panels(figure, [axis], path, grid=False)


def main() -> None:
    """Draw both."""
    for name, ink in INKS.items():
        draw(DOCS / f"megabytes-{name}.png", ink)


if __name__ == "__main__":
    main()
