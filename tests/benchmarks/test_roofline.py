"""The roofline: its launches and pipes, what it refuses, what it prints; kernels compiled for a block; host time."""

import json
from pathlib import Path

import pytest
import torch
from processes import python

from benchmarks.kernels import executed_work, launches, roofline
from benchmarks.kernels.gpus import BUSY, DRAM_BUSY, GPUS, LAUNCH, Demand


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


@pytest.mark.long
def test_a_block_compiles_few_kernels_whatever_the_tokens() -> None:
    """Compiling one takes 1 to 3 seconds during training, so numbers of splits and of tokens are no constants."""
    # interpreted kernels are not compiled
    counted = json.loads(python("-m", "benchmarks.kernels.recompilations", "--json", TRITON_INTERPRET="0"))
    assert set(counted) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    for kernels in counted.values():
        assert sum(kernels.values()) <= 48


@pytest.mark.long
@pytest.mark.parametrize("others", [[], ["3.0.0"]])
def test_it_measures_what_launches_cost(others: list[str], tmp_path: Path) -> None:
    """With the installed Triton, and with every version in a folder: here, the installed one again."""
    for name in others:
        (tmp_path / name).mkdir()
    command = ("-m", "benchmarks.kernels.host_time", "--calls", "2", "--json", "--tritons", tmp_path)
    found = json.loads(python(*command))
    rows = found["rows"]
    assert {name: one.keys() for name, one in found["tritons"].items()} == dict.fromkeys(others, rows.keys())
    ours = [
        f"{name}{way}"
        for name in ("ours, a layer", "ours, a group of 3")
        for way in ("", ", ordinary launches", ", keys in Python")
    ]
    assert set(rows) == {*ours, "plain ops, a layer", "plain ops, 3 layers"}
    assert all(row["us"] > 0 for row in rows.values())
    # y, u and tensors between the launches, then dx, dR and the same: for a layer, and for three in as many launches
    assert rows["ours, a layer"]["allocations"] == 6
    assert rows["ours, a group of 3"]["allocations"] == 12
