"""Decoding with an unmerged adapter: ours and PEFT's LoRA, relative to the model alone.

    python -m benchmarks.serving.decoding [--seconds 60] [--output benchmarks/results]

SmolLM2-135M, all linear layers, LoRA-SB r=64 and PEFT's LoRA r=32; --dtype is auto. A step decodes one token in each of
1, 8 or 64 rows, after a prompt of 16 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_name, dtype_option, measure, provenance, use_dtype
from benchmarks.serving.decoding_steps import Steps
from benchmarks.serving.many_adapters import PEFT_RANK, RANK, base, ours, theirs
from lorasb.utils.atomic_files import write_json

FILE = "decoding-cpu.json"
BATCHES = (1, 8, 64)
ALONE, OURS, PEFT = "model alone", f"LoRA-SB r={RANK}", f"PEFT LoRA r={PEFT_RANK}"
HEAD = ("rows", ALONE, PEFT, OURS, "PEFT over alone", "ours over alone", "ours over PEFT")


def decoding(seconds: float) -> dict[str, Any]:
    """Times of sixteen steps, in turns, by the number of rows."""
    models = {ALONE: base(), PEFT: theirs(1), OURS: ours()}
    found = {}
    for rows in BATCHES:
        ways = {name: Steps(model, rows=rows) for name, model in models.items()}
        stats = measure(dict(ways), "cpu", seconds / len(BATCHES), least=8)
        found[str(rows)] = {name: asdict(one) for name, one in stats.items()}
    return found


def lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table, for the screen and the report."""
    for rows, times in found["decoding"].items():
        cells = []
        for name in (ALONE, PEFT, OURS):
            one = times[name]
            p20, p50, p80 = (one[p] / Steps.COUNT for p in ("p20", "p50", "p80"))
            cells.append(f"{p50:.0f} ms ({p20:.0f}-{p80:.0f})")
        ratios = times[PEFT]["ratio"], times[OURS]["ratio"], times[OURS]["ratio"] / times[PEFT]["ratio"]
        yield [rows, *cells, *(f"{ratio:.2f}x" for ratio in ratios)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help=f"folder of {FILE}")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    torch.manual_seed(0)
    found = {"decoding": decoding(options.seconds)}
    show(f"a step of decoding with SmolLM2-135M, {dtype_name()}", HEAD, lines(found))
    if options.output:
        write_json(options.output / FILE, {**provenance(), **found})


if __name__ == "__main__":
    main()
