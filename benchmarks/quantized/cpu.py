"""4-bit bases on a CPU against bitsandbytes and PEFT, each row in turns in one run.

    python -m benchmarks.quantized.cpu [--row dequantize] [--seconds 6] [--output benchmarks/results]

Rows: dequantize, train, evaluate, block, memory (layers.py), step, decode (models.py). Ours has r=96 (in SmolLM2 its
default of 64), PEFT's LoRA r=32. Layers are 4096 x 4096, NF4 in blocks of 64, plain statistics; --dtype is auto.
It also times what every way needs at least: reading the packed bytes, writing a dense W, or the dense product.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_name, dtype_option, provenance, use_dtype
from benchmarks.quantized import layers, models
from benchmarks.training.initialization import new_memory
from lorasb.utils.atomic_files import write_json

Found = list[dict[str, Any]]

ROWS: dict[str, Callable[[float], Iterator[dict[str, Any]]]] = {
    "dequantize": layers.dequantize,
    "train": layers.train,
    "evaluate": layers.evaluate,
    "block": layers.block,
    "step": models.step,
    "decode": models.decode,
    "memory": layers.memory,
}


def lines(found: Found) -> Iterator[list[str]]:
    """Yield the printed rows: medians, and each way's ratio to the first."""
    for one in found:
        for way, stats in one.get("ways", {}).items():
            ratio = f"{stats['ratio']:.2f} ({stats['ratio_p20']:.2f}-{stats['ratio_p80']:.2f})"
            yield [one["row"], one["case"], way, f"{stats['p50']:.2f}", ratio]
        for name, value in one.items():
            if name not in ("row", "case", "ways"):
                yield [one["row"], one["case"], name, *_plain(value)]


def _plain(value: Any) -> tuple[str, str]:
    if isinstance(value, dict):
        return ", ".join(f"{way}: {size / 1e6:.0f} MB" for way, size in value.items()), ""
    return f"{value:.4g}", ""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=list(ROWS), help="all unless given")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case")
    parser.add_argument("--output", type=Path, help="folder of four-bits-cpu.json; its other rows are preserved")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if options.job == "step_memory":
        call = models.training_step(options.way)
        print(json.dumps({"bytes": new_memory(call)}))
        return
    found: Found = []
    started = time.perf_counter()
    for name in options.row or ROWS:
        found += ROWS[name](options.seconds)
    times = "medians, and ratios to the first way in the same round (20th-80th percentile)"
    show(f"4 bits on a CPU, {dtype_name()}: {times}", ("row", "case", "way", "ms", "ratio"), lines(found), left=3)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        _write(options.output / "four-bits-cpu.json", found)


def _write(path: Path, found: Found) -> None:
    """Replace the file's rows of these cases; each row records where and when it was measured."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    fresh, at = {(one["row"], one["case"]) for one in found}, provenance()
    machine = at.pop("machine")
    rows = [one for one in kept if (one["row"], one["case"]) not in fresh] + [one | at for one in found]
    write_json(path, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
