"""Interleaved timing of several calls, memory, and the provenance of measurements."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from lorasb.utils.precision import DTYPES, processor_class, resolve

DTYPE_VARIABLE = "LORASB_BENCH_DTYPE"  # how processes that a benchmark starts learn its dtype
RESULTS = ("results", "research/results", "REPORT.md")  # what a run itself writes
Call = Callable[[int], Any]


@dataclass(frozen=True)
class Stats:
    """Percentiles of one call's times, in their unit, and of its ratio to another call of the same round."""

    p20: float
    p50: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    rounds: int


def measure(calls: dict[str, Call], device: str, seconds: float, least: int = 10) -> dict[str, Stats]:
    """Time every call once per round, in random order, for about `seconds`. call(i) uses the i-th inputs.

    Times are in milliseconds; on a GPU they come from CUDA events around each call, with its kernels launched ahead.
    The first tenth of the rounds is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for call in calls.values():
        call(0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_once(calls[name], rounds, device))
        rounds += 1
    skip = rounds // 10
    first = times[next(iter(calls))][skip:]
    return {name: stats_of(found[skip:], first) for name, found in times.items()}


def _once(call: Call, i: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call(i)
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(400_000)  # the host gets ahead, so that launching is not what is measured
    begin.record()
    call(i)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def stats_of(times: list[float], first: list[float]) -> Stats:
    """Percentiles of times by round, and of their ratios to another call's times in the same rounds."""
    ratios = [a / b for a, b in zip(times, first, strict=True)]
    p20, p50, p80 = (_percentile(times, p) for p in (20, 50, 80))
    ratio, low, high = (_percentile(ratios, p) for p in (50, 20, 80))
    return Stats(p20, p50, p80, ratio, low, high, len(times))


def _percentile(values: list[float], p: int) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(p / 100))


def peak_bytes(call: Call, device: str) -> int:
    """Peak bytes that a call allocates beyond those allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        return torch.cuda.max_memory_allocated() - before
    return max(accumulate(cpu_allocations(lambda: call(0)), initial=0))


def cpu_allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every tensor that a call allocates on the CPU, and minus those of every one it frees, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # the raw events: averages give an allocation to the op around it
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def saved_bytes(forward: Callable[[], Any], parameters: set[int]) -> int:
    """Bytes that autograd keeps for backward, without what belongs to the layer anyway (by data pointer)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def commit() -> str:
    """Return the current commit, with "-dirty" if files other than results have changed since."""
    found = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip()
    apart = [
        "git",
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        *(f":(exclude,top)benchmarks/{name}" for name in RESULTS),
    ]
    changed = subprocess.run(apart, capture_output=True, text=True).stdout.strip()
    return f"{found or 'no git'}{'-dirty' if changed else ''}"


def dtype_option(parser: argparse.ArgumentParser) -> None:
    """--dtype, for `use_dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default=os.environ.get(DTYPE_VARIABLE, "auto"),
        help="auto: bfloat16 where this machine multiplies it natively, else float32",
    )


def use_dtype(name: str) -> None:
    """Set the dtype of measurements, here and in subprocesses."""
    os.environ[DTYPE_VARIABLE] = name


def measured_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype that is measured in."""
    return resolve(os.environ.get(DTYPE_VARIABLE, "auto"), device).dtype


def dtype_name(dtype: torch.dtype | None = None) -> str:
    """Name of a dtype, by default of the one that is measured in."""
    return str(dtype or measured_dtype()).removeprefix("torch.")


def provenance(device: str = "cpu", dtype: str | None = None) -> dict[str, Any]:
    """Return machine, dtype (by default that of measurements), commit and date, for a file of results."""
    machine = environment(device) | {"dtype": dtype or dtype_name(measured_dtype(device))}
    return {"machine": machine, "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def provenance_columns() -> dict[str, str]:
    """Version, machine and date, for a row of a CSV."""
    return {"version": commit(), "machine": machine_name(dtype_name()), "date": time.strftime("%Y-%m-%d")}


def machine_name(dtype: str) -> str:
    """Processor, its class and a dtype, for a row of a CSV."""
    return f"{_cpu()} ({processor_class()}), {dtype}"


def environment(device: str) -> dict[str, Any]:
    """Versions, processor, GPU and clocks."""
    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "class": processor_class(),
    }
    for package in ("torch", "triton", "peft", "transformers", "lorasb"):
        found[package] = importlib.metadata.version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "sm": f"sm_{properties.major}{properties.minor}", "cuda": torch.version.cuda}
        found |= {"sms": properties.multi_processor_count, "clocks": _clocks()}
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _clocks() -> str:
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return f"{query}: {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi not found"
