"""Plots of a report: energy by layer, energy against rank, and the spectrum."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...utils.plotting import GRAD, INK, MUTED, SIGN, canvas, save

if TYPE_CHECKING:
    from .init_report import InitReport, LayerReport

Path = str | os.PathLike[str]
CURVES = ((("grad", GRAD, "of the gradient ΣG")), ("sign", SIGN, "of its sign"))


def energy_by_layer(report: InitReport, path: Path) -> None:
    """Scatter plot of the energy of sign(ΣG) and of ΣG that each layer captures, in the model's order."""
    layers = [layer for layer in report.layers if layer.energy_sign is not None]
    figure, axes = canvas()
    for kind, color, label in CURVES:
        values = [100 * (getattr(layer, f"energy_{kind}") or 0.0) for layer in layers]
        axes.plot(range(len(layers)), values, "o", markersize=3.5, color=color, alpha=0.85, label=label)
        axes.axhline(sum(values) / len(values), color=color, linewidth=1, linestyle="--")
    axes.set(
        xlabel="adapted layer, from the embeddings to the head",
        ylabel="energy kept (%)",
        ylim=(0, 112),  # room for the legend above 100%
        yticks=range(0, 101, 20),
    )
    axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.0))
    title = f"What rank {_ranks(layers)} keeps of the first full step"
    save(figure, axes, f"{title} ({report.num_samples} samples; dashed: mean)", path)


def energy_by_rank(report: InitReport, path: Path) -> None:
    """Line plot of the energy at every measured rank: the median over layers, with the interquartile range."""
    figure, axes = canvas()
    for kind, color, label in CURVES:
        curves = [curve for layer in report.layers if (curve := getattr(layer, f"curve_{kind}"))]
        if not curves:
            continue
        ranks = range(1, max(map(len, curves)) + 1)
        # Layers were measured up to different ranks: a shorter curve is continued at its last value.
        low, middle, high = zip(*(_quartiles([c[min(k, len(c)) - 1] for c in curves]) for k in ranks), strict=True)
        axes.plot(ranks, middle, color=color, linewidth=2, label=label)
        axes.fill_between(ranks, low, high, color=color, alpha=0.15, linewidth=0)
    chosen = sorted({layer.rank for layer in report.layers})
    for rank in chosen[-1:]:
        axes.axvline(rank, color=MUTED, linewidth=1, linestyle="--")
        axes.annotate(f"r = {rank}", (rank, 4), textcoords="offset points", xytext=(5, 0), color=INK)
    axes.set(xlabel="rank", ylabel="energy kept (%)", ylim=(0, 102), xlim=(1, None))
    axes.legend(frameon=False, loc="upper left")
    save(figure, axes, "Energy of the first full step against rank (median and middle half of the layers)", path)


def spectrum(report: InitReport, path: Path) -> None:
    """Line plot of singular values over the largest one: the median over layers of a kind (q_proj, down_proj, ...)."""
    figure, axes = canvas()
    spectra_by_kind = _spectra_by_kind(report)
    colors = _colors(len(spectra_by_kind))
    for (kind, spectra), color in zip(spectra_by_kind.items(), colors, strict=True):
        length = min(map(len, spectra))
        axes.plot(
            range(1, length + 1),
            [statistics.median(v[k] for v in spectra) for k in range(length)],
            color=color,
            linewidth=1.5,
            label=f"{kind} ({len(spectra)})",
        )
    axes.set(xlabel="index", ylabel="σ over σ₁", yscale="log", xlim=(1, None))
    axes.legend(frameon=False, ncols=2)
    what = {"adamw": "sign(ΣG)", "sgd": "ΣG"}.get(report.update, "the samples' gradients")
    save(figure, axes, f"Singular values of {what} by kind of layer (median)", path)


def _spectra_by_kind(report: InitReport) -> dict[str, list[Sequence[float]]]:
    """Every layer's singular values over its largest one."""
    spectra: dict[str, list[Sequence[float]]] = {}
    for layer in report.layers:
        if layer.curve_sign:
            values = (*layer.singular_values, *layer.beyond)
            spectra.setdefault(layer.name.rpartition(".")[2], []).append([v / (values[0] or 1.0) for v in values])
    return spectra


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(100 * value for value in values)
    last = len(ordered) - 1
    return ordered[round(0.25 * last)], ordered[round(0.5 * last)], ordered[round(0.75 * last)]


def _ranks(layers: list[LayerReport]) -> str:
    return "/".join(map(str, sorted({layer.rank for layer in layers})))


def _colors(count: int) -> Any:
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.05 + 0.85 * i / max(1, count - 1)) for i in range(count)]
