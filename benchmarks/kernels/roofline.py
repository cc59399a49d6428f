"""Calculated cost of a block of adapted linears on a GPU: the work of every launch against the bare base.

    python -m benchmarks.kernels.roofline [--gpu a6000] [--model mistral-7b] [--r 96] [--tokens 512,2048,8192]
                                          [--output PNG] [--json FILE]

The launches are the library's, and their work is counted by executing their compiled code
(benchmarks.kernels.executed_work). The work of cuBLAS and plain torch is computed from their operations. Takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # kernels are compiled

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import MODELS, Group
from benchmarks.common.timing import provenance
from benchmarks.kernels.executed_work import compulsory, launch_work
from benchmarks.kernels.gpus import GPUS, MODEL, SECTOR_BYTES, Demand, Gpu
from benchmarks.kernels.launches import plan_for, record
from lorasb.kernels.launcher import Launch
from lorasb.utils.plotting import canvas, save

BF16, THIN = 2, 256
OPS = ("forward", "backward")
LAUNCH_COLUMNS = ("linears", "kernel", "grid", "blocks", "tensor", "issue", "shared", "L2", "DRAM", "us", "limit")


@dataclass(frozen=True)
class Cost:
    """Seconds of each direction, or their ratios to the bare base."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both directions together."""
        return self.forward + self.backward


def demand(launch: Launch, gpu: Gpu, again: bool = False) -> Demand:
    """The demand of one of our launches, by execution; the GEMM reads what the thin pass just read and wrote.

    `again`: a sibling has just read x.
    """
    work, a = launch_work(launch, gpu.arch), launch.arguments
    hot = [a["x"]] if again and launch.name == "prep_forward" else []
    if launch.name == "extended_gemm":
        hot = [a["v"], *(a["xs"] if sum(a["Ks"]) else ())]
    sizes = [tensor.numel() * tensor.element_size() for tensor in hot]
    return Demand(
        flops=(work.tensor_flops + 2 * work.tf32_flops) / gpu.share,
        issue_slots=work.issue_slots,
        shared_wavefronts=work.shared_wavefronts,
        l2=work.global_sectors * SECTOR_BYTES,
        dram=compulsory(launch) - sum(size - gpu.read(size) for size in sizes),
    )


def gemm(gpu: Gpu, M: int, K: int, N: int, accumulate: bool = False, hot: bool = False) -> Demand:
    """cuBLAS: [M, K] · [K, N], tiles of 128 x 128; `accumulate` reads the result too, `hot`: [M, K] was just used."""
    left, result = M * K * BF16, M * N * BF16
    moved = (gpu.read(left) if hot else left) + K * N * BF16 + result + (gpu.read(result) if accumulate else 0)
    tiles = -(-M // 128) * -(-N // 128)
    asked = tiles * (min(M, 128) + min(N, 128)) * K * BF16 + M * N * BF16
    return Demand(flops=2 * M * K * N, l2=asked if min(K, N) <= THIN else 0, dram=moved)


def elementwise(gpu: Gpu, count: int, reads: int) -> Demand:
    """An elementwise op that reads `reads` tensors, which were just used, and writes one."""
    size = count * BF16
    return Demand(l2=(reads + 1) * size, dram=reads * gpu.read(size) + size)


def base(group: Group, M: int, gpu: Gpu) -> dict[str, list[Demand]]:
    """The frozen linears alone, and autograd's additions of their dx."""
    adds = [elementwise(gpu, M * group.n, 2)] * (len(group.ms) - 1)
    return {
        "forward": [gemm(gpu, M, group.n, m, hot=i > 0) for i, m in enumerate(group.ms)],
        "backward": [gemm(gpu, M, m, group.n) for m in group.ms] + adds,
    }


def eager(group: Group, M: int, r: int, gpu: Gpu) -> dict[str, list[Demand]]:
    """y = x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ in plain torch, differentiated by autograd."""
    found, n = base(group, M, gpu), group.n
    for m in group.ms:
        found["forward"] += [gemm(gpu, *size, hot=True) for size in ((M, n, r), (M, r, r), (M, r, m))]
        found["forward"] += [elementwise(gpu, M * m, 1), elementwise(gpu, M * m, 2)]
        products = (gemm(gpu, *size, hot=True) for size in ((M, m, r), (r, M, r), (M, r, r), (M, r, n)))
        found["backward"] += [elementwise(gpu, M * m, 1), *products, elementwise(gpu, M * n, 2)]
    return found


def parts_of(group: Group, grouped: bool) -> list[tuple[int, ...]]:
    """Output widths that share a call: of all members, or of one at a time."""
    return [group.ms] if grouped else [(m,) for m in group.ms]


def ours(group: Group, ms: tuple[int, ...], r: int, M: int, gpu: Gpu, op: str, path: str, again: bool) -> list[Demand]:
    """One call of the library on one path: our launches, plus cuBLAS's products on "addmm"."""
    demands = [demand(one, gpu, again) for one in calls(op, group.n, ms, r, M, gpu.arch, gpu.sms, path)]
    if path == "fused":
        return demands
    if op == "forward":
        pairs = ((gemm(gpu, M, r, m, hot=True), gemm(gpu, M, group.n, m, accumulate=True, hot=True)) for m in ms)
        return demands + [one for pair in pairs for one in pair]
    thin = gemm(gpu, M, r * len(ms), group.n, hot=True)
    return [*demands, thin, *(gemm(gpu, M, m, group.n, accumulate=True, hot=True) for m in ms)]


def adapted(group: Group, M: int, r: int, gpu: Gpu, grouped: bool, path: str | None) -> dict[str, list[Demand]]:
    """The library's calls, for each linear or for the group, on one path; None: the one that its tables choose."""
    parts = parts_of(group, grouped)
    found: dict[str, list[Demand]] = {op: [] for op in OPS}
    for op in OPS:
        for i, ms in enumerate(parts):
            chosen = path or plan_for(op, torch.bfloat16, M, group.n, ms, r, gpu.arch, gpu.sms).path
            found[op] += ours(group, ms, r, M, gpu, op, chosen, again=i > 0)
    found["backward"] += [elementwise(gpu, M * group.n, 2)] * (len(parts) - 1)
    return found


def calls(op: str, n: int, ms: tuple[int, ...], r: int, M: int, arch: str, sms: int, path: str) -> list[Launch]:
    """The library's launches on one path, with the blocks that its tables choose."""
    chosen = plan_for(op, torch.bfloat16, M, n, ms, r, arch, sms)
    return record(op, replace(chosen, path=path), torch.bfloat16, M, n, ms, r)


def fused_calls(model: str, r: int, M: int, arch: str, sms: int, grouped: bool) -> dict[str, list[Launch]]:
    """Every launch of one block."""
    found: dict[str, list[Launch]] = {op: [] for op in OPS}
    for group in MODELS[model]:
        for ms in parts_of(group, grouped):
            for op in OPS:
                found[op] += calls(op, group.n, ms, r, M, arch, sms, "fused")
    return found


def costs(groups: tuple[Group, ...], r: int, M: int, gpu: Gpu) -> dict[str, Cost]:
    """Seconds of these linears, by variant."""
    variants = {
        "bare": lambda g: base(g, M, gpu),
        "eager": lambda g: eager(g, M, r, gpu),
        "addmm": lambda g: adapted(g, M, r, gpu, False, "addmm"),
        "fused": lambda g: adapted(g, M, r, gpu, False, "fused"),
        "addmm, grouped": lambda g: adapted(g, M, r, gpu, True, "addmm"),
        "fused, grouped": lambda g: adapted(g, M, r, gpu, True, "fused"),
        "as chosen": lambda g: adapted(g, M, r, gpu, True, None),
    }
    found = {}
    for name, variant in variants.items():
        times = {op: sum(one.seconds(gpu) for g in groups for one in variant(g)[op]) for op in OPS}
        found[name] = Cost(times["forward"], times["backward"])
    return found


def launch_rows(model: str, r: int, M: int, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Yield every launch of the grouped kernels: microseconds of each pipe, and the limiting one."""
    for group in MODELS[model]:
        for op in OPS:
            for one in calls(op, group.n, group.ms, r, M, gpu.arch, gpu.sms, "fused"):
                a, asked = one.arguments, demand(one, gpu)
                yield {
                    "tokens": M,
                    "linears": "/".join(group.names),
                    "kernel": one.name + (" (dx, dR)" if a.get("BACKWARD") else ""),
                    "grid": one.grid,
                    "blocks": "x".join(str(a[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in a),
                    **{pipe: round(1e6 * seconds, 2) for pipe, seconds in asked.pipes(gpu).items()},
                    "us": round(1e6 * asked.seconds(gpu), 2),
                    "limit": asked.limit(gpu),
                }


def launch_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Format the rows of one number of tokens as a table."""
    view = Table(title=title)
    for name in LAUNCH_COLUMNS:
        view.add_column(name, justify="left" if name in ("linears", "kernel", "limit") else "right")
    for row in rows:
        view.add_row(*(f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in LAUNCH_COLUMNS))
    return view


def overhead_rows(model: str, r: int, tokens: list[int], gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Yield each variant's ratios to the bare base, and its gain over the eager chain."""
    for M in tokens:
        found = costs(MODELS[model], r, M, gpu)
        bare = found.pop("bare")
        for name, cost in found.items():
            yield {
                "tokens": M,
                "variant": name,
                "forward": round(cost.forward / bare.forward, 4),
                "backward": round(cost.backward / bare.backward, 4),
                "f+b": round(cost.total / bare.total, 4),
                "eager / this": round(found["eager"].total / cost.total, 4),
            }


def overhead_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Overhead over the bare base, and the gain over the eager chain."""
    view = Table(title=title)
    for name in rows[0]:
        view.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        ratios = (f"{100 * (row[name] - 1):+.1f}%" for name in (*OPS, "f+b"))
        view.add_row(str(row["tokens"]), row["variant"], *ratios, f"{row['eager / this']:.2f}x")
    return view


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of f+b over the bare base."""
    figure, axes = canvas()
    names = list(dict.fromkeys(row["variant"] for row in rows))
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    for i, name in enumerate(names):
        heights = [100 * (row["f+b"] - 1) for row in rows if row["variant"] == name]
        places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(tokens))]
        bars = axes.bar(places, heights, 0.72 / len(names), label=name)
        axes.bar_label(bars, fmt="%.0f%%", fontsize=7)
    axes.set_xticks(range(len(tokens)), [f"{M} tokens" for M in tokens])
    axes.set_ylabel("f+b over the bare linears (%)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, axes, title, path)


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="a6000")
    parser.add_argument("--model", choices=list(MODELS), default="mistral-7b")
    parser.add_argument("--r", type=int, default=96)
    parser.add_argument("--tokens", default="512,2048,8192", help="comma-separated")
    parser.add_argument("--output", type=Path, help="file of the chart (default: roofline-GPU-MODEL.png)")
    parser.add_argument("--json", type=Path, help="write the rows of both tables to a file too")
    chosen = parser.parse_args()
    if os.environ["TRITON_INTERPRET"] != "0":
        parser.error("the roofline executes compiled kernels: unset TRITON_INTERPRET")
    return chosen


def main() -> None:
    """Print the tables and draw the chart."""
    chosen = options()
    tokens, gpu, console = [int(M) for M in chosen.tokens.split(",")], GPUS[chosen.gpu], Console(width=140)
    what = f"{chosen.model}, r={chosen.r}, {gpu.name}"
    launches = []
    for M in tokens:
        rows = list(launch_rows(chosen.model, chosen.r, M, gpu))
        console.print(launch_table(rows, f"Launches of one block, fused + grouped, us per pipe: {what}, {M} tokens"))
        launches += rows
    overheads = list(overhead_rows(chosen.model, chosen.r, tokens, gpu))
    console.print(overhead_table(overheads, f"One block over its bare linears: {what}"))
    console.print(MODEL, highlight=False)
    if chosen.json:
        record = provenance() | {"gpu": gpu.name, "model": chosen.model, "r": chosen.r, "how": MODEL.splitlines()}
        text = json.dumps(record | {"overheads": overheads, "launches": launches}, indent=1)
        chosen.json.write_text(text + "\n", encoding="utf-8")
    path = chosen.output or Path(f"roofline-{chosen.gpu}-{chosen.model}.png")
    chart(overheads, f"Calculated, not measured: one block of {what}", path)
    console.print(f"chart: {path}")


if __name__ == "__main__":
    main()
