"""What a block of adapted linears costs on a GPU, on paper: bytes and FLOPs of every launch against the bare base.

    python -m benchmarks.kernels.roofline [--gpu a6000] [--model mistral-7b] [--r 96] [--tokens 512,2048,8192]
                                          [--output PNG]

Bytes and FLOPs of our kernels are counted from the launches that the library makes (benchmarks.kernels.traffic); those
of the others from the operations that they consist of.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import MODELS, Group
from benchmarks.kernels.launches import plan_for, record
from benchmarks.kernels.traffic import Traffic, traffic
from lorasb.kernels.launcher import Launch
from lorasb.kernels.plan import Plan
from lorasb.utils.plotting import canvas, save

BF16 = 2
OPS = ("forward", "backward")


@dataclass(frozen=True)
class Gpu:
    """Peaks: dense bf16 FLOP/s with fp32 sums, DRAM and L2 bytes/s, multiprocessors."""

    name: str
    arch: str
    sms: int
    flops: float
    dram: float
    l2: float


GPUS = {
    "a6000": Gpu("RTX A6000", "sm_86", 84, 154.8e12, 768e9, 2.5e12),
    "a100": Gpu("A100 80GB", "sm_80", 108, 312e12, 2039e9, 5.0e12),
    "4090": Gpu("RTX 4090", "sm_89", 128, 165.2e12, 1008e9, 5.0e12),
    "h100": Gpu("H100 SXM", "sm_90", 132, 989e12, 3350e9, 5.5e12),
}
GEMM_EFFICIENCY, DRAM_EFFICIENCY, LAUNCH = 0.75, 0.85, 3e-6
ASSUMPTIONS = f"""Assumptions (no GPU was measured for this table):
 - a launch takes the longest of: its FLOPs at {GEMM_EFFICIENCY:.0%} of the dense bf16 peak, its operands and results
   once at {DRAM_EFFICIENCY:.0%} of the DRAM peak, for thin products and elementwise work the bytes its
   programs ask for at the L2 peak (a big product's share of the peak has that in it); plus {LAUNCH * 1e6:.0f} us;
 - the bare base, cuBLAS and our extended GEMM reach the same share of the peak; launches do not overlap;
 - every intermediate of the eager chain goes through DRAM; its scaling is applied to the [M, out] product, as PEFT
   does;
 - wave quantization, clocks under load and Python's time are left out;
 - without groups autograd adds the dx of siblings (in the bare model too)."""


@dataclass(frozen=True)
class Cost:
    """Seconds of each direction, or their ratios to the bare base."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both directions together."""
        return self.forward + self.backward


def seconds(t: Traffic, gpu: Gpu) -> float:
    """Time of one launch under the assumptions."""
    compute = t.flops / (gpu.flops * GEMM_EFFICIENCY)
    through_l2 = (t.loaded + t.stored) / gpu.l2 if t.thin else 0.0
    return max(compute, t.compulsory / (gpu.dram * DRAM_EFFICIENCY), through_l2) + LAUNCH


def gemm(M: int, K: int, N: int, accumulate: bool = False) -> Traffic:
    """[M, K] · [K, N], tiles of 128 x 128; `accumulate` reads the result too."""
    elements = M * K + K * N + M * N * (2 if accumulate else 1)
    tiles = -(-M // 128) * -(-N // 128)
    return Traffic(
        2 * M * K * N, tiles * (min(M, 128) + min(N, 128)) * K * BF16, M * N * BF16, elements * BF16, min(K, N) <= 256
    )


def elementwise(count: int, reads: int) -> Traffic:
    """`reads` tensors in, one out."""
    return Traffic(0, count * reads * BF16, count * BF16, count * (reads + 1) * BF16)


def base(group: Group, M: int, r: int) -> dict[str, list[Traffic]]:
    """The frozen linears alone, and autograd's additions of their dx."""
    adds = [elementwise(M * group.n, 2)] * (len(group.ms) - 1)
    return {
        "forward": [gemm(M, group.n, m) for m in group.ms],
        "backward": [gemm(M, m, group.n) for m in group.ms] + adds,
    }


def eager(group: Group, M: int, r: int) -> dict[str, list[Traffic]]:
    """y = x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ as anybody would write it, differentiated by autograd."""
    bare, n = base(group, M, r), group.n
    for m in group.ms:
        bare["forward"] += [gemm(M, n, r), gemm(M, r, r), gemm(M, r, m), elementwise(M * m, 1), elementwise(M * m, 2)]
        bare["backward"] += [elementwise(M * m, 1), gemm(M, m, r), gemm(r, M, r), gemm(M, r, r), gemm(M, r, n)]
        bare["backward"] += [elementwise(M * n, 2)]
    return bare


def addmm(group: Group, M: int, r: int, gpu: Gpu) -> dict[str, list[Traffic]]:
    """Our prep, then two cuBLAS products, the second onto the first; dR in a launch of its own."""
    found: dict[str, list[Traffic]] = {op: [] for op in OPS}
    for m in group.ms:
        for op in OPS:
            launches = calls(op, group.n, (m,), r, M, gpu.arch, gpu.sms, "addmm")
            found[op] += [traffic(launch) for launch in launches]
        found["forward"] += [gemm(M, r, m), gemm(M, group.n, m, accumulate=True)]
        found["backward"] += [gemm(M, r, group.n), gemm(M, m, group.n, accumulate=True)]
    found["backward"] += [elementwise(M * group.n, 2)] * (len(group.ms) - 1)
    return found


def fused(group: Group, M: int, r: int, gpu: Gpu, grouped: bool) -> dict[str, list[Traffic]]:
    """Our two launches a direction, for each linear or for the group."""
    parts = [group.ms] if grouped else [(m,) for m in group.ms]
    found = {
        op: [traffic(one) for ms in parts for one in calls(op, group.n, ms, r, M, gpu.arch, gpu.sms, "fused")]
        for op in OPS
    }
    found["backward"] += [elementwise(M * group.n, 2)] * (len(parts) - 1)
    return found


def calls(op: str, n: int, ms: tuple[int, ...], r: int, M: int, arch: str, sms: int, path: str) -> list[Launch]:
    """The library's launches on one path, with the blocks that its tables choose."""
    chosen = plan_for(op, torch.bfloat16, M, n, ms, r, arch, sms)
    return record(op, Plan(path, chosen.prep, chosen.gemm), torch.bfloat16, M, n, ms, r)


def fused_calls(model: str, r: int, M: int, arch: str, sms: int, grouped: bool) -> dict[str, list[Launch]]:
    """Every launch of one block."""
    found: dict[str, list[Launch]] = {op: [] for op in OPS}
    for group in MODELS[model]:
        for ms in [group.ms] if grouped else [(m,) for m in group.ms]:
            for op in OPS:
                found[op] += calls(op, group.n, ms, r, M, arch, sms, "fused")
    return found


def costs(groups: tuple[Group, ...], r: int, M: int, gpu: Gpu) -> dict[str, Cost]:
    """Seconds of these linears, by variant."""
    variants = {
        "bare": lambda g: base(g, M, r),
        "eager": lambda g: eager(g, M, r),
        "addmm": lambda g: addmm(g, M, r, gpu),
        "fused": lambda g: fused(g, M, r, gpu, False),
        "grouped": lambda g: fused(g, M, r, gpu, True),
    }
    found = {}
    for name, variant in variants.items():
        times = {op: sum(seconds(t, gpu) for g in groups for t in variant(g)[op]) for op in OPS}
        found[name] = Cost(times["forward"], times["backward"])
    return found


def overheads(model: str, r: int, M: int, gpu: Gpu) -> dict[str, Cost]:
    """Time of one block over the bare base's, by variant."""
    found = costs(MODELS[model], r, M, gpu)
    bare = found["bare"]
    return {name: Cost(cost.forward / bare.forward, cost.backward / bare.backward) for name, cost in found.items()}


def launch_table(model: str, r: int, M: int, gpu: Gpu) -> Table:
    """Every launch of the grouped kernels."""
    view = Table(title=f"Launches of one block, fused + grouped: {model}, r={r}, {M} tokens, {gpu.name}")
    for name in ("linears", "kernel", "grid", "blocks", "GFLOP", "MB asked for", "MB stored", "MB at least", "us"):
        view.add_column(name, justify="left" if name in ("linears", "kernel") else "right")
    for group in MODELS[model]:
        for op in OPS:
            for one in calls(op, group.n, group.ms, r, M, gpu.arch, gpu.sms, "fused"):
                t, a = traffic(one), one.arguments
                blocks = "x".join(str(a[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in a)
                numbers = (t.flops / 1e9, t.loaded / 1e6, t.stored / 1e6, t.compulsory / 1e6, seconds(t, gpu) * 1e6)
                label = one.name + (" (dx, dR)" if a.get("BACKWARD") else "")
                view.add_row("/".join(group.names), label, str(one.grid), blocks, *(f"{x:.1f}" for x in numbers))
    return view


def overhead_table(model: str, r: int, tokens: list[int], gpu: Gpu) -> Table:
    """Overhead over the bare base, and the gain over the eager chain."""
    view = Table(title=f"One block of {model} over its bare linears, r={r}, {gpu.name}")
    for name in ("tokens", "variant", "forward", "backward", "f+b", "eager / this"):
        view.add_column(name, justify="left" if name == "variant" else "right")
    for M in tokens:
        found = costs(MODELS[model], r, M, gpu)
        bare = found.pop("bare")
        for name, cost in found.items():
            ratios = (cost.forward / bare.forward, cost.backward / bare.backward, cost.total / bare.total)
            gain = found["eager"].total / cost.total
            view.add_row(str(M), name, *(f"{100 * (x - 1):+.1f}%" for x in ratios), f"{gain:.2f}x")
    return view


def chart(model: str, r: int, tokens: list[int], gpu: Gpu, path: Path) -> None:
    """Bars of f+b over the bare base."""
    figure, axes = canvas()
    names = ("eager", "addmm", "fused", "grouped")
    for i, name in enumerate(names):
        heights = []
        for M in tokens:
            found = costs(MODELS[model], r, M, gpu)
            heights.append(100 * (found[name].total / found["bare"].total - 1))
        places = [j + 0.2 * (i - 1.5) for j in range(len(tokens))]
        bars = axes.bar(places, heights, 0.18, label=name)
        axes.bar_label(bars, fmt="%.0f%%", fontsize=8)
    axes.set_xticks(range(len(tokens)), [f"{M} tokens" for M in tokens])
    axes.set_ylabel("f+b over the bare linears (%)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, axes, f"On paper, not measured: one block of {model}, r={r}, {gpu.name}", path)


def main() -> None:
    """Print the tables and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="a6000")
    parser.add_argument("--model", choices=list(MODELS), default="mistral-7b")
    parser.add_argument("--r", type=int, default=96)
    parser.add_argument("--tokens", default="512,2048,8192", help="comma-separated")
    parser.add_argument("--output", type=Path, help="where to draw the chart; roofline-GPU-MODEL.png unless given")
    options = parser.parse_args()
    tokens, gpu = [int(M) for M in options.tokens.split(",")], GPUS[options.gpu]
    console = Console(width=140)
    for M in tokens:
        console.print(launch_table(options.model, options.r, M, gpu))
    console.print(overhead_table(options.model, options.r, tokens, gpu))
    console.print(
        f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.dram / 1e9:.0f} GB/s DRAM, {gpu.l2 / 1e12:.1f} TB/s L2"
    )
    console.print(ASSUMPTIONS, highlight=False)
    path = options.output or Path(f"roofline-{options.gpu}-{options.model}.png")
    chart(options.model, options.r, tokens, gpu, path)
    console.print(f"chart: {path}")


if __name__ == "__main__":
    main()
