"""What an initialization kept, layer by layer: as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...utils.atomic_files import write_json
from . import plots
from .layer_report import LayerReport
from .rank_allocation import RankSuggestion, suggest

SHOWN_VALUES = 3
TUPLES = ("shape", "singular_values", "beyond", "curve_sign", "curve_grad")


@dataclass
class InitReport:
    """What `lorasb.initialize` did. Prints as a table; `save`, `load` and `plot` keep it.

    `left` says what was left alone on purpose: a tied head, routers, experts that nobody named. `longest_start` is the
    limit that `initialize` was given, None where there is none.
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
        """Mean over layers of the captured share of sign(ΣG)."""
        return _mean([layer.energy_sign for layer in self.layers])

    @property
    def energy_grad(self) -> float | None:
        """Mean over layers of the captured share of ΣG."""
        return _mean([layer.energy_grad for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitReport:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = [
            LayerReport(**layer | {key: tuple(layer[key]) for key in TUPLES if key in layer})
            for layer in values.pop("layers")
        ]
        return cls(**values, layers=layers)

    def __rich__(self) -> Table:
        what = f"{len(self.layers)} layers, {self.num_samples} samples, {self.seconds:.1f} s"
        kept = f"mean energy kept: sign {_percent(self.energy_sign)}, gradient {_percent(self.energy_grad)}"
        if self.why:
            kept += f"; {self.strategy} ({self.why})"
        if self.stability is not None:
            kept += f"; overlap of two halves of the samples {_percent(self.stability)}"
        if self.start is not None and self.start < 1.0:
            kept += f"; R starts {self.longest_start:g} of its steps away, {_percent(self.start)} of the first step"
        kept += "".join(f"\nleft alone: {line}" for line in self.left)
        table = Table(title=f"{self.init} initialization: {what}", caption=kept)
        table.add_column("layer", overflow="fold")
        for name in ("shape", "r", "energy of sign(G)", "energy of G", "σ₁ σ₂ σ₃ … σᵣ", "zeros", "ms"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            table.add_row(*_row(layer))
        return table

    def __str__(self) -> str:
        console = Console(width=120, record=False, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        with console.capture() as capture:
            console.print(self)
        console.file.close()
        return capture.get()

    @property
    def start(self) -> float | None:
        """Mean over layers of the share of η that the first step was taken with."""
        return _mean([layer.start for layer in self.layers])

    @property
    def stability(self) -> float | None:
        """Mean over layers of the overlap between two halves of the samples, where it was asked for."""
        return _mean([layer.stability for layer in self.layers])

    def suggest_ranks(
        self, *, energy: float | None = None, parameters: int | None = None, of: str = "sign"
    ) -> RankSuggestion:
        """Ranks by layer, for `lorasb.patch(model, rank_pattern=report.suggest_ranks(...).rank_pattern)`.

        Args:
            energy: the least rank of each layer that keeps this share.
            parameters: the most energy for this many trained parameters, Σ r².
            of: energy of the "sign" of ΣG, or of ΣG itself ("grad").

        Returns:
            Ranks, up to what was measured (r + 32), and which layers would need more.

        Raises:
            ValueError: neither or both targets, or a report without energies.
        """
        return suggest(self.layers, energy, parameters, of)

    def plot(self, path: str | os.PathLike[str], kind: str = "layers") -> None:
        """Draw a PNG.

        Args:
            path: of the file.
            kind: "layers" (the energy that each layer keeps, of sign(ΣG) and of ΣG), "ranks" (energy against rank) or
                "spectrum" (singular values by kind of layer).

        Raises:
            ImportError: matplotlib is missing; the message has the pip command.
            ValueError: nothing to draw, as these factors came from no gradient, or no such kind.
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
