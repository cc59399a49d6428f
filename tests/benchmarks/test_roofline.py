"""What the roofline counts is what the kernels do: grids, loads and stores recorded under the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.kernels import launches, roofline
from benchmarks.kernels.traffic import traffic
from lorasb.kernels import linear as launch
from lorasb.kernels import plan
from lorasb.kernels.launcher import Launch, observed

CASES = [  # M, n, ms, r, bias
    (40, 96, (64,), 16, False),
    (70, 128, (128, 64, 64), 32, True),
    (9, 300, (100, 80), 24, False),
    (16, 256, (96, 64, 64), 96, False),
    (130, 123, (59,), 17, True),
]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes that the kernels load and store inside the block, as the interpreter sees them."""
    moved = {"loaded": 0, "stored": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: object) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: object, pointers: object, mask: object, *rest: object) -> object:
        moved["loaded"] += int(np.sum(mask.data)) * size(pointers)
        return load(self, pointers, mask, *rest)

    def counting_store(self: object, pointers: object, value: object, mask: object, *rest: object) -> object:
        if np.size(mask.data) > 1:  # not the reset of a counter
            moved["stored"] += int(np.sum(mask.data)) * size(pointers)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    yield moved
    monkeypatch.undo()


def each_launch(
    op: str, M: int, n: int, ms: tuple[int, ...], r: int, bias: bool, dtype: torch.dtype
) -> Iterator[tuple[Launch, dict[str, int]]]:
    """Really launch, one launch at a time, and say what each one moved."""
    cases = [reference.make_case((M,), n, m, r, dtype, bias=bias) for m in ms]
    members = launch.Members(
        [c.weight for c in cases], [c.a for c in cases], [c.core for c in cases], [c.b for c in cases], [1.0] * len(ms)
    )
    chosen = plan.choose(plan.Shape(op, plan.DTYPES[dtype], M, n, sum(ms), r, len(ms)), plan.INTERPRETER, 1)
    marks: list[dict[str, int]] = []
    with pytest.MonkeyPatch.context() as patch, counted(patch) as moved, observed() as found:
        patch.setattr(launch, "launch", lambda *arguments: (marks.append(dict(moved)), original(*arguments)))
        if op == "forward":
            launch.forward(cases[0].x, members, [c.bias for c in cases], chosen)
        else:
            launch.backward([c.dy for c in cases], members, [c.x @ c.a.t() for c in cases], chosen, True, True)
        marks.append(dict(moved))
    for one, before, after in zip(found, marks, marks[1:], strict=False):
        yield one, {name: after[name] - before[name] for name in after}


original = launch.launch


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("M", "n", "ms", "r", "bias"), CASES)
def test_bytes_are_those_of_the_kernels(
    op: str, M: int, n: int, ms: tuple[int, ...], r: int, bias: bool, dtype: torch.dtype
) -> None:
    r = min(r, n, *ms)
    really = list(each_launch(op, M, n, ms, r, bias, dtype))
    chosen = plan.choose(plan.Shape(op, plan.DTYPES[dtype], M, n, sum(ms), r, len(ms)), plan.INTERPRETER, 1)
    recorded = launches.record(op, chosen, dtype, M, n, ms, r, bias)
    assert [(one.name, one.grid) for one in recorded] == [(one.name, one.grid) for one, _ in really]
    for counted_on, (_, moved) in zip(recorded, really, strict=True):
        told = traffic(counted_on)
        assert {"loaded": told.loaded, "stored": told.stored} == moved
        assert told.compulsory <= told.loaded + told.stored


@pytest.mark.parametrize("model", roofline.MODELS)
def test_a_block_launches_what_the_roofline_says(model: str) -> None:
    for grouped in (False, True):
        calls = roofline.fused_calls(model, 96, 2048, "sm_86", 84, grouped)
        groups = roofline.MODELS[model]
        members = len(groups) if grouped else sum(len(group.ms) for group in groups)
        for op in ("forward", "backward"):
            assert len(calls[op]) == 2 * members


def test_overheads_are_in_order() -> None:
    """No adapter can cost less than its FLOPs, and fusing cannot cost more than the chain."""
    result = roofline.overheads("mistral-7b", 96, 2048, roofline.GPUS["a6000"])
    assert result["eager"].total > result["addmm"].total > result["fused"].total > result["grouped"].total
    assert result["fused"].forward > 1.0


def test_the_command_prints_its_assumptions(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels.roofline",
        "--gpu",
        "a6000",
        "--tokens",
        "512,2048",
        "--output",
        str(tmp_path / "chart.png"),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("Assumptions", "no GPU was measured", "fused", "grouped", "extended_gemm", "768"):
        assert word in done.stdout
    assert (tmp_path / "chart.png").stat().st_size > 10_000


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_a_block_compiles_few_kernels_whatever_the_tokens(arch: str) -> None:
    """Each is a second or three in the middle of a training: numbers of splits and of tokens are no constants."""
    command = [sys.executable, "-m", "benchmarks.kernels.recompilations", "--arch", arch, "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # interpreted kernels are compiled for nothing
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(json.loads(done.stdout)[arch].values()) <= 48
