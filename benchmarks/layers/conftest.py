"""Pytest options, the machine info of the JSON, and the fixture that measures a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.common.timing import DTYPES, commit, environment, measure, peak_bytes, saved_bytes, use_dtype
from benchmarks.layers.variants import Problem, calls, check, variants


def device() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --seconds and --dtype."""
    parser.addoption("--seconds", type=float, default=2.0 if device() == "cpu" else 0.5, help="per case, all variants")
    parser.addoption("--dtype", choices=("auto", *DTYPES), default="auto", help="besides float32 on a CPU; see timing")


def pytest_configure(config: pytest.Config) -> None:
    """Set the dtype that cases are made with."""
    use_dtype(config.getoption("--dtype"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Record versions, GPU and clocks in place of the host name."""
    machine_info.clear()
    machine_info.update(environment(device()))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Record only the commit."""
    commit_info.clear()
    commit_info["id"] = commit()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Problem, str], None]:
    """Measure every variant of a problem in turns; pytest-benchmark itself times three rounds of ours."""

    def run(problem: Problem, direction: str) -> None:
        forwards = variants(problem)
        check(problem, forwards)
        timed = calls(problem, forwards, direction)
        stats = measure(timed, problem.device, request.config.getoption("--seconds"))
        found: dict[str, dict[str, Any]] = {}
        for name, forward in forwards.items():
            problem.forget_gradients()
            found[name] = asdict(stats[name]) | {
                "peak_bytes": peak_bytes(timed[name], problem.device),
                "saved_bytes": saved_bytes(partial(forward, problem.xs[0]), problem.parameters()),
            }
        benchmark.extra_info.update(**case_of(problem, direction), variants=found)
        benchmark.pedantic(timed["ours"], args=(0,), rounds=3)

    return run


def case_of(problem: Problem, direction: str) -> dict[str, Any]:
    """Describe a problem for the JSON."""
    return {
        "n": problem.n,
        "ms": list(problem.ms),
        "r": problem.r,
        "M": problem.M,
        "direction": direction,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }
