"""The report of an initialization: energy captured by layer, as a table, as JSON and as plots."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ...utils.atomic_files import write_json
from ...utils.reading import read_json
from . import plots
from .layer_report import LayerReport
from .rank_allocation import RankSuggestion, suggest

SHOWN_VALUES = 3  # leading singular values in a row of the table, before the last one
TUPLE_FIELDS = (  # of LayerReport, which JSON turns into lists
    "shape",
    "singular_values",
    "beyond",
    "curve_sign",
    "curve_grad",
)


@dataclass
class InitReport:
    """The result of `lorasb.initialize`. Prints as a table; has methods `save`, `load`, `plot` and `suggest_ranks`.

    `left` lists modules that are not adapted by design: a tied head, routers, experts that are not named in
    `target_parameters`. `longest_start` is the limit passed to `initialize`, or None.
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

    @property
    def energy_sign(self) -> float | None:
        """Mean over layers of the fraction of ‖sign(ΣG)‖² that is captured."""
        return _mean([layer.energy_sign for layer in self.layers])

    @property
    def energy_grad(self) -> float | None:
        """Mean over layers of the fraction of ‖ΣG‖² that is captured."""
        return _mean([layer.energy_grad for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitReport:
        """Load a file of `save`.

        Raises:
            ValueError: the file is damaged, or no report.
        """
        values = read_json(path)
        try:
            # `if key in layer`: reports of earlier versions lack newer fields, which have defaults.
            layers = [
                LayerReport(**layer | {key: tuple(layer[key]) for key in TUPLE_FIELDS if key in layer})
                for layer in values.pop("layers")
            ]
            return cls(**values, layers=layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a report of an initialization, got another content ({error})") from None

    def __rich__(self) -> Table:
        what = f"{len(self.layers)} layers, {self.num_samples} samples, {self.seconds:.1f} s"
        caption = f"mean energy kept: sign {_percent(self.energy_sign)}, gradient {_percent(self.energy_grad)}"
        if self.why:
            caption += f"; {self.strategy} ({self.why})"
        if self.stability is not None:
            caption += f"; overlap of two halves of the samples {_percent(self.stability)}"
        if self.start is not None and self.start < 1.0:
            caption += f"; R starts {self.longest_start:g} of its steps away, {_percent(self.start)} of the first step"
        caption += "".join(f"\nleft alone: {line}" for line in self.left)
        table = Table(title=f"{self.init} initialization: {what}", caption=caption)
        table.add_column("layer", overflow="fold")
        for name in ("shape", "r", "energy of sign(G)", "energy of G", "σ₁ σ₂ σ₃ … σᵣ", "zeros", "ms"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            table.add_row(*_row(layer))
        return table

    def __str__(self) -> str:
        # A console of its own: the default one would print to stdout.
        console = Console(width=120, record=False, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        with console.capture() as capture:
            console.print(self)
        console.file.close()
        return capture.get()

    @property
    def start(self) -> float | None:
        """Mean over layers of the factor on η of the first step (`longest_start`)."""
        return _mean([layer.start for layer in self.layers])

    @property
    def stability(self) -> float | None:
        """Mean over layers of the subspace overlap between two halves of the samples; None if not measured."""
        return _mean([layer.stability for layer in self.layers])

    def suggest_ranks(
        self, *, energy: float | None = None, parameters: int | None = None, of: str = "sign"
    ) -> RankSuggestion:
        """Ranks by layer, for `lorasb.patch(model, rank_pattern=report.suggest_ranks(...).rank_pattern)`.

        Args:
            energy: fraction in (0, 1]; every layer gets the smallest rank that captures it.
            parameters: number of trained parameters, Σ r²; ranks maximize the mean energy within it.
            of: energy of the "sign" of ΣG, or of ΣG itself ("grad").

        Returns:
            Ranks up to the largest that was measured (r + 32), and the layers that would need more.

        Raises:
            ValueError: neither or both targets, or a report without energies.
        """
        return suggest(self.layers, energy, parameters, of)

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


PLOTS = {"layers": plots.energy_by_layer, "ranks": plots.energy_by_rank, "spectrum": plots.spectrum}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}%"


def _row(layer: LayerReport) -> list[str]:
    sigma = layer.singular_values
    shown = " ".join(f"{value:.3g}" for value in sigma[:SHOWN_VALUES])
    if len(sigma) > SHOWN_VALUES:
        shown += f" … {sigma[-1]:.3g}"
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    energies = [_percent(layer.energy_sign), _percent(layer.energy_grad)]
    zeros = "not reached" if layer.fallback else str(layer.zeros)
    return [layer.name, shape, str(layer.rank), *energies, shown, zeros, f"{1000 * layer.seconds:.0f}"]
