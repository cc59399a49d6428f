"""The report of an initialization: energy captured per layer, as a table, JSON and plots."""

from __future__ import annotations

import bisect
import heapq
import io
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..constants import MAX_RANK
from ..utils.atomic_files import write_json
from ..utils.plotting import GRAD, INK, MUTED, SIGN, canvas, save
from ..utils.reading import Json, read_json


@dataclass(frozen=True)
class LayerReport:
    """The report of one layer. Energies: fractions of a squared Frobenius norm that span(B) x span(A) captures."""

    name: str  # name of the layer in the base model
    shape: tuple[int, int]  # (out_features, in_features)
    rank: int  # r
    energy_sign: float | None  # fraction of ‖sign(ΣG)‖²; None if no gradient was taken
    energy_grad: float | None  # fraction of ‖ΣG‖²; None likewise, or if a cache was made at a smaller rank
    singular_values: tuple[float, ...]  # the r leading ones of the matrix that was factored
    zeros: int  # number of entries of ΣG that are exactly zero
    seconds: float  # duration of the SVD
    beyond: tuple[float, ...] = ()  # up to 32 further singular values, from the oversampling of the SVD
    curve_sign: tuple[float, ...] = ()  # energy_sign at ranks 1, 2, ..., as far as measured
    curve_grad: tuple[float, ...] = ()  # energy_grad at ranks 1, 2, ..., as far as measured
    stability: float | None = None  # overlap of the subspaces from two halves of the samples; None if not measured
    fallback: str | None = None  # replacement for the gradient if no sample reached the layer ("weight"), else None
    start: float | None = None  # factor on the first step's η (`longest_start`); None if no gradient was taken

    @classmethod
    def of(cls, values: Json) -> LayerReport:
        """Create a report from JSON values, which have lists instead of tuples."""
        fields: Json = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**fields)


T = TypeVar("T")
Path = str | os.PathLike[str]
CURVES = (("grad", GRAD, "of the gradient ΣG"), ("sign", SIGN, "of its sign"))


def energy_by_layer(report: InitReport, path: Path) -> None:
    """Scatter plot of the energy of sign(ΣG) and of ΣG that each layer captures, in model order."""
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
    ranks = "/".join(map(str, sorted({layer.rank for layer in layers})))
    title = f"What rank {ranks} keeps of the first full step ({report.num_samples} samples; dashed: mean)"
    save(figure, axes, title, path)


def energy_by_rank(report: InitReport, path: Path) -> None:
    """Line plot of the energy at every measured rank: the median over layers, with the interquartile range."""
    figure, axes = canvas()
    for kind, color, label in CURVES:
        curves = [curve for layer in report.layers if (curve := getattr(layer, f"curve_{kind}"))]
        if not curves:
            continue
        ranks = range(1, max(map(len, curves)) + 1)
        # Layers were measured up to different ranks: a shorter curve is extended with its last value.
        energies = [sorted(100 * curve[min(k, len(curve)) - 1] for curve in curves) for k in ranks]
        quartiles = (round(share * (len(curves) - 1)) for share in (0.25, 0.5, 0.75))
        low, middle, high = ([values[place] for values in energies] for place in quartiles)
        axes.plot(ranks, middle, color=color, linewidth=2, label=label)
        axes.fill_between(ranks, low, high, color=color, alpha=0.15, linewidth=0)
    rank = max(layer.rank for layer in report.layers)
    axes.axvline(rank, color=MUTED, linewidth=1, linestyle="--")
    axes.annotate(f"r = {rank}", (rank, 4), textcoords="offset points", xytext=(5, 0), color=INK)
    axes.set(xlabel="rank", ylabel="energy kept (%)", ylim=(0, 102), xlim=(1, None))
    axes.legend(frameon=False, loc="upper left")
    save(figure, axes, "Energy of the first full step against rank (median and middle half of the layers)", path)


def spectrum(report: InitReport, path: Path) -> None:
    """Line plot of singular values relative to the largest: the median per kind of layer (q_proj, down_proj, ...)."""
    figure, axes = canvas()
    import matplotlib

    known = ((one.name, (*one.singular_values, *one.beyond)) for one in report.layers if one.curve_sign)
    kinds = by_kind((name, [value / (values[0] or 1.0) for value in values]) for name, values in known)
    for i, (kind, spectra) in enumerate(kinds.items()):
        length = min(map(len, spectra))
        medians = [statistics.median(v[k] for v in spectra) for k in range(length)]
        color = matplotlib.colormaps["viridis"](0.05 + 0.85 * i / max(1, len(kinds) - 1))
        axes.plot(range(1, length + 1), medians, color=color, linewidth=1.5, label=f"{kind} ({len(spectra)})")
    axes.set(xlabel="index", ylabel="σ over σ₁", yscale="log", xlim=(1, None))
    axes.legend(frameon=False, ncols=2)
    what = {"adamw": "sign(ΣG)", "sgd": "ΣG"}.get(report.update, "the samples' gradients")
    save(figure, axes, f"Singular values of {what} by kind of layer (median)", path)


@dataclass(frozen=True)
class RankSuggestion:
    """Ranks for `LoRASBConfig(rank_pattern=...)`."""

    rank_pattern: dict[str, int]  # rank by layer name
    trained_parameters: int  # Σ r²
    energy: float  # mean over layers of the fraction that these ranks capture
    short: tuple[str, ...] = ()  # layers below the energy target even at the largest measured rank


def _best_ranks(curves: dict[str, Sequence[float]], parameters: int) -> dict[str, int]:
    """Greedy allocation: the next rank goes to the layer that gains most energy per added parameter."""
    if parameters < len(curves):
        raise ValueError(f"expected at least one parameter for each of {len(curves)} layers, got {parameters}")
    ranks, used = dict.fromkeys(curves, 0), 0
    # Each layer's next rank, ordered by gain; rank 1 comes first for every layer. A sorted list is a heap.
    queue = sorted((-math.inf, name) for name in curves)
    while queue:
        _, name = heapq.heappop(queue)
        added = 2 * ranks[name] + 1  # (r + 1)² - r²
        if used + added > parameters:
            continue  # this layer is done, but one of a smaller rank may still fit
        used += added
        ranks[name] = r = ranks[name] + 1
        curve = curves[name]
        if r < len(curve):
            heapq.heappush(queue, ((curve[r - 1] - curve[r]) / (2 * r + 1), name))
    return ranks


@dataclass
class InitReport:
    """The result of `lorasb.initialize`. Prints as a table; has methods `save`, `load`, `plot` and `suggest_ranks`.

    Attributes:
        layers: one report per layer: `name`, `rank`, `energy_sign`, `energy_grad`, `stability`, `start`, ...
        energy_sign, energy_grad: mean over layers of the captured share of the energy of sign(ΣG) and of ΣG.
        stability: mean overlap of the subspaces from two halves of the samples; None if not measured.
        start: mean factor on η that limits R's first step to `longest_start`.
        loss: mean loss of the base model on the samples; None without data.
        seconds: duration.
        init, update, strategy: what was run; `why` is the reason for the strategy.
        lr, num_samples, seed: η, the number of samples, and the seed for drawing them and for the SVD.
        longest_start: the limit passed to `initialize`, or None.
        rate: the peak learning rate that lr="auto" measured, to train with, or None.
        left: modules left unadapted by design: a tied head, routers, experts not in `target_parameters`.
    """

    init: str
    update: str
    lr: float | None
    num_samples: int
    seed: int
    loss: float | None
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    strategy: str = "none"
    why: str = ""
    left: list[str] = field(default_factory=list)
    longest_start: float | None = None
    rate: float | None = None

    @property
    def energy_sign(self) -> float | None:
        """Mean over layers of the fraction of ‖sign(ΣG)‖² that is captured."""
        return _mean([layer.energy_sign for layer in self.layers])

    @property
    def energy_grad(self) -> float | None:
        """Mean over layers of the fraction of ‖ΣG‖² that is captured."""
        return _mean([layer.energy_grad for layer in self.layers])

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitReport:
        """Load a report written by `save`.

        Raises:
            ValueError: the file is damaged, or is not a report.
        """
        values = read_json(path)
        try:
            return cls(layers=[LayerReport.of(one) for one in values.pop("layers")], **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected an initialization report, got other content ({error})") from None

    def __rich__(self) -> Table:
        what = f"{len(self.layers)} layers, {self.num_samples} samples, {self.seconds:.1f} s"
        lines = [f"{self.strategy}: {self.why}"] if self.why else []  # the reason for what "auto" chose
        if self.stability is not None:
            lines.append(f"overlap of two halves of the samples {self.stability:.0%}")
        if self.start is not None and self.start < 1.0:
            lines.append(f"R starts {self.longest_start:g} optimizer steps from 0, {self.start:.0%} of the first step")
        if self.rate is not None:
            lines.append(f"learning rate {self.rate:.2g}")
        lines += [f"left alone: {line}" for line in self.left]
        table = Table(title=f"{self.init} initialization: {what}", caption=escape("\n".join(lines)))
        table.add_column("layers", overflow="fold")
        for name in ("number", "r", "energy of sign(G)", "energy of G", "least of G"):
            table.add_column(name, justify="right")
        for kind, layers in by_kind((layer.name, layer) for layer in self.layers).items():
            ranks = "/".join(map(str, sorted({layer.rank for layer in layers})))
            signs, grads = ([getattr(layer, f"energy_{of}") for layer in layers] for of in ("sign", "grad"))
            least = min((value for value in grads if value is not None), default=None)
            table.add_row(kind, str(len(layers)), ranks, *map(_percent, (_mean(signs), _mean(grads), least)))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=120, file=text).print(self)
        return text.getvalue()

    @property
    def start(self) -> float | None:
        """Mean over layers of the factor on the first step's η (`longest_start`)."""
        return _mean([layer.start for layer in self.layers])

    @property
    def stability(self) -> float | None:
        """Mean over layers of the subspace overlap between two halves of the samples; None if not measured."""
        return _mean([layer.stability for layer in self.layers])

    def suggest_ranks(
        self, *, energy: float | None = None, parameters: int | None = None, of: str = "sign"
    ) -> RankSuggestion:
        """Suggest ranks by layer, for `lorasb.patch(model, rank_pattern=report.suggest_ranks(...).rank_pattern)`.

        Args:
            energy: fraction in (0, 1]; every layer gets the smallest rank that captures it.
            parameters: limit on trained parameters, Σ r²; ranks maximize the mean energy within it.
            of: energy of the "sign" of ΣG, or of ΣG itself ("grad").

        Returns:
            Ranks up to the largest that was measured (r + 32), and the layers that would need more.

        Raises:
            ValueError: neither or both of `energy` and `parameters`, or a report without energies.
        """
        if (energy is None) == (parameters is None):
            raise ValueError("expected an energy target or a number of parameters: suggest_ranks(energy=0.8)")
        if of not in ("sign", "grad"):
            raise ValueError(f"of must be 'sign' or 'grad', got {of!r}")
        curves = {layer.name: curve for layer in self.layers if (curve := getattr(layer, f"curve_{of}"))}
        if not curves:
            raise ValueError(f"init={self.init!r} has no gradient energy to choose ranks by: use init='update'")
        if energy is None:
            ranks = _best_ranks(curves, int(parameters or 0))
        elif not 0 < energy <= 1:
            raise ValueError(f"expected an energy target in (0, 1], got {energy!r}")
        else:
            ranks = {name: min(bisect.bisect_left(curve, energy) + 1, len(curve)) for name, curve in curves.items()}
        # Longest names first: patterns match the end of a name, so `proj` would also match `encoder.proj`.
        ranks = {name: min(ranks[name], MAX_RANK) for name in sorted(ranks, key=len, reverse=True)}
        captured = {name: curves[name][r - 1] for name, r in ranks.items()}
        short = tuple(name for name, value in captured.items() if energy is not None and value < energy)
        return RankSuggestion(ranks, sum(r * r for r in ranks.values()), sum(captured.values()) / len(captured), short)

    def plot(self, path: str | os.PathLike[str], kind: str = "layers") -> None:
        """Plot to a PNG file.

        Args:
            path: path of the file.
            kind: "layers" (energy captured by each layer, of sign(ΣG) and of ΣG), "ranks" (energy against rank) or
                "spectrum" (singular values by kind of layer).

        Raises:
            ImportError: matplotlib is missing; the message has the pip command.
            ValueError: an unknown kind, or a data-free init, which has no energies.
        """
        if kind not in PLOTS:
            raise ValueError(f"kind must be one of {', '.join(PLOTS)}, got {kind!r}")
        if self.energy_sign is None:
            raise ValueError(f"init={self.init!r} takes no gradient: there is no energy to draw")
        PLOTS[kind](self, path)


PLOTS = {"layers": energy_by_layer, "ranks": energy_by_rank, "spectrum": spectrum}


def by_kind(layers: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Group values by the kind of layer (q_proj, ...), from pairs of a layer's name and a value."""
    kinds: dict[str, list[T]] = {}
    for name, value in layers:
        kinds.setdefault(name.rpartition(".")[2], []).append(value)
    return kinds


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}%"
