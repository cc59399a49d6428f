"""Tables and a chart of a run of the suite.

python -m benchmarks.layers.suite_report RESULTS.json [...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import MODELS
from lorasb.utils.plotting import canvas, save

CASE = ("n", "m", "r", "M", "dtype", "direction")  # what identifies a case
Row = dict[str, Any]


def read(paths: list[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Read the machine, and a row for each variant of each case.

    Raises:
        ValueError: the results are of two machines, or there are none.
    """
    machine: dict[str, Any] = {}
    rows: list[Row] = []
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        if machine and machine != run["machine_info"]:
            raise ValueError(f"{path} was measured on another machine than {paths[0]}: report them separately")
        machine = run["machine_info"]
        for case in run["benchmarks"]:
            rows += _variants(case["extra_info"])
    if not rows:
        raise ValueError(f"no results in {', '.join(map(str, paths))}: run make bench-gpu or make bench-cpu first")
    return machine, rows


def _variants(info: dict[str, Any]) -> list[Row]:
    """A row for each variant of a case."""
    shape = {
        "n": info["n"],
        "m": "+".join(map(str, info["ms"])),
        **{k: info[k] for k in ("r", "M", "dtype", "direction")},
    }
    return [{**shape, "variant": name, **stats} for name, stats in info["variants"].items()]


def by_case(rows: list[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Each case with its variants."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), {})[row["variant"]] = row
    for variants in cases.values():
        yield next(iter(variants.values())), variants


def table(machine: dict[str, Any], rows: list[Row], direction: str) -> Table:
    """Median ratio to the bare linear of the same round, with p20-p80, and bytes kept for backward."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    title = f"{direction}: median time over the bare linear's in the same round (p20-p80); {place(machine)}"
    view = Table(title=title, caption="kept: bytes that autograd keeps for backward, PEFT's LoRA / chain / ours")
    for name in ("in", "out", "M", "r", "dtype", "bare ms", *names[1:], "kept"):
        view.add_column(name, justify="right")
    for first, variants in by_case([row for row in rows if row["direction"] == direction]):
        cells = [_ratio(variants[name]) if name in variants else "" for name in names[1:]]
        peft = next(row for name, row in variants.items() if "LoRA" in name)
        kept = " / ".join(size(row["saved_bytes"]) for row in (peft, variants["chain"], variants["ours"]))
        shape = [str(first[name]) for name in ("n", "m", "M", "r", "dtype")]
        view.add_row(*shape, f"{variants['bare']['p50']:.3f}", *cells, kept)
    return view


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})"


def size(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def place(machine: dict[str, Any]) -> str:
    """The machine and versions of a measurement, in words."""
    kind = f" ({machine['class']})" if "class" in machine else ""
    where = machine.get("gpu") or f"{machine['cpu']}{kind}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, peft {machine['peft']}"


def chart(machine: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Draw forward and backward at the most tokens and largest rank: each variant's median ratio, by shape."""
    chosen = [row for row in rows if row["direction"] == "forward+backward"]
    tokens, rank = max(row["M"] for row in chosen), max(row["r"] for row in chosen)
    cases = [case for case in by_case(chosen) if case[0]["M"] == tokens and case[0]["r"] == rank]
    figure, axes = canvas()
    names = [name for name in dict.fromkeys(row["variant"] for row in chosen) if name != "bare"]
    for i, name in enumerate(names):
        points = [(j, variants[name]) for j, (_, variants) in enumerate(cases) if name in variants]
        at = [j + 0.8 * (i + 0.5) / len(names) - 0.4 for j, _ in points]
        heights = [100 * (row["ratio"] - 1) for _, row in points]
        spread = [[abs(100 * (row[p] - row["ratio"])) for _, row in points] for p in ("ratio_p20", "ratio_p80")]
        axes.bar(at, heights, 0.75 / len(names), yerr=spread, label=name, error_kw={"linewidth": 0.8})
    outs = [first["m"].replace("+", "+\n") for first, _ in cases]
    labels = [f"{first['n']} to\n{out}\n{first['dtype']}" for (first, _), out in zip(cases, outs, strict=True)]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.set_ylabel("f+b over the bare linear (%)")
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes, f"{tokens} tokens, r={rank} (PEFT: r=32), medians with p20-p80: {place(machine)}", path)


def blocks(rows: list[Row]) -> Table:
    """Sum the f+b medians of a block's linears, for each model whose linears were all measured."""
    view = Table(title="One block, f+b: sums of the medians of its linears")
    for name in ("model", "M", "r", "dtype", "bare ms", "chain", "ours", "ours, grouped", "ours, grouped, over chain"):
        view.add_column(name, justify="right")
    cases = {tuple(first[name] for name in CASE): variants for first, variants in by_case(rows)}
    for model, groups in MODELS.items():
        for r, M, dtype in dict.fromkeys((row["r"], row["M"], row["dtype"]) for row in rows):
            keys = [(g.n, "+".join(map(str, g.ms)), r, M, dtype, "forward+backward") for g in groups]
            if not all(key in cases for key in keys):
                continue
            found = [cases[key] for key in keys]
            bare, chain, ours = (sum(v[name]["p50"] for v in found) for name in ("bare", "chain", "ours"))
            grouped = sum(v.get("ours, grouped", v["ours"])["p50"] for v in found)
            ratios = (f"{bare:.3f}", f"{chain / bare:.3f}", f"{ours / bare:.3f}", f"{grouped / bare:.3f}")
            view.add_row(model, str(M), str(r), dtype, *ratios, f"{grouped / chain:.2f}x")
    return view


def summary(rows: list[Row]) -> str:
    """Geometric mean of ours over the chain, f+b."""
    pairs = [v for _, v in by_case([row for row in rows if row["direction"] == "forward+backward"])]
    ratio = statistics.geometric_mean(v["ours"]["p50"] / v["chain"]["p50"] for v in pairs)
    return f"f+b, {len(pairs)} cases: ours takes {ratio:.3f}x of the chain's time (geometric mean of medians)"


def main() -> None:
    """Print, and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="folder (default: the first file's)")
    options = parser.parse_args()
    machine, rows = read(options.results)
    console = Console(width=170)
    for direction in dict.fromkeys(row["direction"] for row in rows):
        console.print(table(machine, rows, direction))
    block_table = blocks(rows)
    if block_table.row_count:
        console.print(block_table)
    console.print(summary(rows))
    folder, stem = options.output or options.results[0].parent, options.results[0].stem
    folder.mkdir(parents=True, exist_ok=True)
    chart(machine, rows, folder / f"{stem}.png")
    console.print(f"in {folder}: {stem}.png")


if __name__ == "__main__":
    main()
