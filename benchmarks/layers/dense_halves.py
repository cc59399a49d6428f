"""16-bit dense bases on a CPU without native 16-bit products, against torch in fp32, in turns in one run.

    python -m benchmarks.layers.dense_halves [--seconds 4] [--features 4096] [--output benchmarks/results]

Ways: the bare layer in fp32; ours with an adapter of r=96 over a base in bf16 and fp16 (W widened a panel at a time)
and in fp32; torch's own bare layer in bf16, forward only, as its backward takes a hundred times as long there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.tables import show
from benchmarks.common.timing import measure, provenance
from benchmarks.quantized.ways import RANK, ours, row
from lorasb.backends import cpp
from lorasb.utils.atomic_files import write_json

TOKENS = (1, 4, 16, 64, 512)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def both_ways(
    module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: list[Tensor]
) -> Callable[[int], None]:
    """Forward, and backward to x and (if there is one) R."""

    def run(_: int) -> None:
        module(x).backward(dy)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return run


def without_gradients(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[int], None]:
    """Forward alone."""

    def run(_: int) -> None:
        with torch.no_grad():
            module(x)

    return run


def cases(features: int, seconds: float) -> list[dict[str, Any]]:
    """Measure forward, and forward and backward, at every number of tokens."""
    dense = nn.Linear(features, features, bias=False).requires_grad_(False)
    layers = {name: ours(nn.Linear(features, features, bias=False, dtype=dtype)) for name, dtype in DTYPES.items()}
    bare = nn.Linear(features, features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    found = []
    for tokens in TOKENS:
        x, dy = torch.randn(tokens, features), torch.randn(tokens, features)
        wide = x.clone().requires_grad_()
        forward = {
            "torch fp32, bare": without_gradients(dense, x),
            "torch bf16, bare": without_gradients(bare, x.bfloat16()),
        }
        both = {"torch fp32, bare": both_ways(dense, wide, dy, [])}
        for name, dtype in DTYPES.items():
            layer, way = layers[name], f"ours {name}, r={RANK}"
            forward[way] = without_gradients(layer, x.to(dtype))
            both[way] = both_ways(layer, x.to(dtype).requires_grad_(), dy.to(dtype), [layer.lorasb_R["default"]])
        found.append(row("halves", f"{tokens} tokens, f", measure(forward, "cpu", seconds)))
        found.append(row("halves", f"{tokens} tokens, f+b", measure(both, "cpu", seconds)))
    return found


def lines(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the printed rows: medians, and each way's ratio to the first."""
    for one in found:
        for way, stats in one["ways"].items():
            ratio = f"{stats['ratio']:.2f} ({stats['ratio_p20']:.2f}-{stats['ratio_p80']:.2f})"
            yield [one["case"], way, f"{stats['p50']:.2f}", ratio]


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """Lines of the table in docs/kernels.md: forward and backward by tokens, relative to torch's fp32."""
    ways = [f"ours {name}, r={RANK}" for name in DTYPES]
    lines = [f"| f+b | torch fp32, bare | {' | '.join(ways)} |", "|---|---:|---:|---:|---:|"]
    for one in found:
        tokens, _, kind = one["case"].partition(", ")
        if kind == "f+b":
            times = " | ".join(f"{one['ways'][way]['ratio']:.2f}x" for way in ways)
            lines.append(f"| {tokens} | {one['ways']['torch fp32, bare']['p50']:.4g} ms | {times} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="folder of halves-cpu.json")
    parser.add_argument("--table", type=Path, help="print the table of docs/kernels.md from this file; measure nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(markdown(json.loads(options.table.read_text(encoding="utf-8"))["rows"])))
        return
    if not cpp.serves(torch.bfloat16):
        raise SystemExit(
            "this CPU multiplies bf16 natively, or the C++ extension is missing: set LORASB_MAX_CPU_ISA=avx2 "
            "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 to measure as on an AVX2 CPU"
        )
    torch.manual_seed(0)
    started = time.perf_counter()
    found = cases(options.features, options.seconds)
    size = f"{options.features} x {options.features}"
    title = f"{size}: medians, and ratios to torch's fp32 (20th-80th percentile)"
    show(title, ("case", "way", "ms", "ratio"), lines(found), left=2)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        write_json(options.output / "halves-cpu.json", provenance(dtype="as said by each way") | {"rows": found})


if __name__ == "__main__":
    main()
