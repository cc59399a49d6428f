"""What the roofline counts is what the kernels do: grids, loads and stores recorded under the interpreter; host time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from processes import python
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.kernels import executed_work, launches, roofline
from benchmarks.kernels.gpus import BUSY, DRAM_BUSY, GPUS, LAUNCH, Demand
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


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the kernels load and store from now on, as the interpreter sees them."""
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
    return moved


def each_launch(
    op: str, chosen: plan.LaunchPlan, dtype: torch.dtype, M: int, n: int, ms: tuple[int, ...], r: int, bias: bool
) -> Iterator[tuple[Launch, dict[str, int]]]:
    """Really launch, one launch at a time, and say what each one moved."""
    cases = [reference.make_case((M,), n, m, r, dtype, bias=bias) for m in ms]
    members = launch.Members(
        *([getattr(c, name) for c in cases] for name in ("weight", "a", "core", "b", "bias")), [1.0] * len(ms)
    )
    marks: list[dict[str, int]] = []
    with pytest.MonkeyPatch.context() as patch, observed() as found:
        moved = counted(patch)
        patch.setattr(launch, "launch", lambda *arguments: (marks.append(dict(moved)), original(*arguments)))
        if op == "forward":
            launch.forward(cases[0].x, members, chosen)
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
    chosen = plan.choose(plan.Shape(op, plan.DTYPES[dtype], M, n, sum(ms), r, len(ms)), plan.INTERPRETER, 1)
    given = op, chosen, dtype, M, n, ms, r, bias
    really, recorded = list(each_launch(*given)), launches.record(*given)
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


def test_a_launch_takes_as_long_as_its_busiest_pipe() -> None:
    gpu = GPUS["a6000"]
    bound = {
        "tensor": Demand(flops=gpu.flops, l2=1.0),
        "issue": Demand(issue_slots=4 * gpu.sms * gpu.clock, flops=gpu.flops / 2),
        "shared": Demand(shared_wavefronts=gpu.sms * gpu.clock, issue_slots=gpu.sms * gpu.clock),
        "L2": Demand(l2=gpu.l2, dram=gpu.dram / 2),
        "DRAM": Demand(dram=gpu.dram),
    }
    for name, demand in bound.items():
        assert demand.limit(gpu) == name
        assert demand.seconds(gpu) == pytest.approx(max(demand.pipes(gpu).values()) + LAUNCH)
        assert demand.pipes(gpu)[name] == pytest.approx({"L2": 1.0, "DRAM": 1 / DRAM_BUSY}.get(name, 1 / BUSY))
    assert Demand(flops=1.0).limit(gpu) == "launch"


def test_what_was_just_used_and_fits_into_l2_is_not_read_again() -> None:
    a6000, h100 = GPUS["a6000"], GPUS["h100"]
    y = 2048 * 4096 * 2  # more than half of an A6000's L2, and not of an H100's
    assert (a6000.read(y), h100.read(y)) == (y, 0)
    assert (a6000.read(3e6), a6000.read(3e6 + 1)) == (0, 3e6 + 1)
    assert roofline.elementwise(a6000, y // 2, 2).dram == 3 * y
    assert roofline.elementwise(h100, y // 2, 2).dram == y
    cold, hot = (roofline.gemm(h100, 2048, 4096, 96, hot=one).dram for one in (False, True))
    assert cold - hot == y
    result = 2048 * 96 * 2
    assert roofline.gemm(a6000, 2048, 4096, 96, accumulate=True).dram == y + 4096 * 96 * 2 + result


def test_a_kernel_that_is_not_counted_is_refused() -> None:
    recorded = launches.record_gradient(torch.bfloat16, 64, 64, 64, "sm_86")[0]
    with pytest.raises(ValueError, match="expected prep_forward, prep_backward or extended_gemm, got grad_sign"):
        list(executed_work.shares(recorded))


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("sys.argv", ["roofline"])
    with pytest.raises(SystemExit, match="2"):
        roofline.main()
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.long
def test_the_command_prints_and_writes_what_it_executed(tmp_path: Path) -> None:
    """No adapter can cost less than its FLOPs, and fusing cannot cost more than the chain."""
    chart, rows = tmp_path / "chart.png", tmp_path / "rows.json"
    model = ("--model", "llama-3.2-3b", "--tokens", "2048")
    command = ("-m", "benchmarks.kernels.roofline", *model, "--output", chart, "--json", rows)
    printed = python(*command, TRITON_INTERPRET="0")
    for word in ("The model", "no GPU was measured", "fused", "grouped", "extended_gemm", "tensor", "limit"):
        assert word in printed
    assert chart.stat().st_size > 10_000
    found = json.loads(rows.read_text())
    total = {row["variant"]: row["f+b"] for row in found["overheads"]}
    assert total["eager"] > total["addmm"] > total["fused"] > total["fused, grouped"] > 1.0
    assert total["as chosen"] <= min(total[name] for name in total if name != "as chosen") * 1.02
    assert len(found["launches"]) == 16
    for row in found["launches"]:
        pipes = {name: row[name] for name in ("tensor", "issue", "shared", "L2", "DRAM")}
        assert row["limit"] == max(pipes, key=lambda name: pipes[name])
        assert min(pipes.values()) > 0


def test_a_block_compiles_few_kernels_whatever_the_tokens() -> None:
    """Each is a second or three in the middle of a training: numbers of splits and of tokens are no constants."""
    # interpreted kernels are compiled for nothing
    counted = json.loads(python("-m", "benchmarks.kernels.recompilations", "--json", TRITON_INTERPRET="0"))
    assert set(counted) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    for kernels in counted.values():
        assert sum(kernels.values()) <= 48


def test_it_measures_what_launches_cost(tmp_path: Path) -> None:
    """With the installed Triton, and with every one in a folder: here the installed one again."""
    (tmp_path / "3.0.0").mkdir()
    command = ("-m", "benchmarks.kernels.host_time", "--calls", "2", "--json", "--tritons", tmp_path)
    found = json.loads(python(*command))
    rows = found["rows"]
    assert found["tritons"].keys() == {"3.0.0"}
    assert found["tritons"]["3.0.0"].keys() == rows.keys()
    ours = [
        f"{name}{way}"
        for name in ("ours, a layer", "ours, a group of 3")
        for way in ("", ", ordinary launches", ", keys in Python")
    ]
    assert set(rows) == {*ours, "plain ops, a layer", "plain ops, 3 layers"}
    assert all(row["us"] > 0 for row in rows.values())
    # y, u and what lies between the launches; dx, dR and the same: of a layer, and of three, in as many launches
    assert rows["ours, a layer"]["allocations"] == 6
    assert rows["ours, a group of 3"]["allocations"] == 12
