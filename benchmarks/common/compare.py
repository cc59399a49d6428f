"""What changed between two runs of a benchmark, and whether it is more than their noise.

    python -m benchmarks.common.compare BEFORE.json AFTER.json [--all] [--fail]

Compared are ratios to the peer that ran in turns with ours in the same run, so that another machine's speed cancels.
A change is reported if the ranges from 20th to 80th percentile of the two runs do not overlap. `--fail` exits with 1 if
anything became slower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = ("row", "case", "name", "fullname")  # keys that identify an entry of a list


@dataclass(frozen=True)
class Measured:
    """A ratio, and the range of the middle 60% of its rounds."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One figure in both runs."""

    name: str
    before: Measured
    after: Measured

    @property
    def factor(self) -> float:
        """After over before: above 1 is slower."""
        return self.after.ratio / self.before.ratio

    @property
    def verdict(self) -> str:
        """ "slower", "faster", or "" if the ranges overlap."""
        if self.after.low > self.before.high:
            return "slower"
        return "faster" if self.after.high < self.before.low else ""


def figures(found: Any, name: str = "") -> Iterator[tuple[str, Measured]]:
    """Yield every ratio in a file of results with the path of names to it, without the peers' own, which are 1."""
    if isinstance(found, dict):
        if {"ratio", "ratio_p20", "ratio_p80"} <= found.keys():
            if (found["ratio_p20"], found["ratio_p80"]) != (1.0, 1.0):
                yield name, Measured(found["ratio"], found["ratio_p20"], found["ratio_p80"])
            return
        for key, value in found.items():
            plain = key in ("rows", "ways", "benchmarks", "extra_info", "variants")
            yield from figures(value, name if plain else f"{name} {key}".strip())
    elif isinstance(found, list):
        for value in found:
            own = " ".join(str(value[key]) for key in NAMES[:3] if key in value) if isinstance(value, dict) else ""
            yield from figures(value, f"{name} {own}".strip())


def compare(before: Any, after: Any) -> tuple[list[Change], list[str]]:
    """Return the changes of figures in both runs, and the names of those in one run only."""
    first, second = dict(figures(before)), dict(figures(after))
    changes = [Change(name, first[name], second[name]) for name in first if name in second]
    return changes, sorted(first.keys() ^ second.keys())


def view(changes: list[Change], apart: list[str], everything: bool) -> Table:
    """Table of the changes beyond noise, or of all, the largest first."""
    shown = [change for change in changes if everything or change.verdict]
    title = f"{len(changes)} figures in both, {sum(bool(change.verdict) for change in changes)} changed beyond noise"
    table = Table(title=title)
    for name in ("figure", "before", "after", "after / before", ""):
        table.add_column(name, justify="left" if name in ("figure", "") else "right")
    for change in sorted(shown, key=lambda one: abs(one.factor - 1), reverse=True):
        cells = (f"{one.ratio:.3f} ({one.low:.3f}-{one.high:.3f})" for one in (change.before, change.after))
        table.add_row(change.name, *cells, f"{change.factor:.3f}", change.verdict)
    if apart:
        table.caption = f"in one of the two only: {', '.join(apart[:6])}{' ...' if len(apart) > 6 else ''}"
    return table


def read(path: Path) -> Any:
    """Read a file of results.

    Raises:
        SystemExit: the file has no results; the message says what was expected.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"expected a JSON file of benchmark results, found none at {path}: {error}") from None
    if not any(True for _ in figures(found)):
        raise SystemExit(f"{path} holds no ratios to a peer: expected a file that a command of benchmarks/ wrote")
    return found


def main() -> None:
    """Compare two files and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="what did not change, too")
    parser.add_argument("--fail", action="store_true", help="exit with 1 where anything became slower")
    options = parser.parse_args()
    changes, apart = compare(read(options.before), read(options.after))
    Console(width=140).print(view(changes, apart, options.all))
    if options.fail and any(change.verdict == "slower" for change in changes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
