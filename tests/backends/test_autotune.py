"""Autotuning with a clock of its own: what is chosen, kept and refused at the first call of a kind."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import operands_of
from kernel_cases import group_cases

from lorasb.backends import autotune
from lorasb.backends import triton as fused
from lorasb.compat.triton import installed
from lorasb.kernels import linear as launch
from lorasb.kernels import plan
from lorasb.kernels.operands import Mask
from lorasb.kernels.plan import LaunchPlan
from lorasb.utils.atomic_files import CACHE_VARIABLE

SHAPE = plan.Shape("forward", "fp32", 512, 64, 48, 8)
ARCH, SMS = "sm_86", 84


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; no kind has been called yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(autotune.MODE, raising=False)
    monkeypatch.setattr(autotune, "_first", {})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    plan.forget()
    yield tmp_path
    plan.forget()


class Clock:
    """Takes so many ms for each path and tile, or 2 for a path that is slow and 1 for others; counts its rounds."""

    def __init__(self, cost: str | Callable[[LaunchPlan], float]) -> None:
        self.cost = cost if callable(cost) else lambda one: 2.0 if one.path == cost else 1.0
        self.rounds = 0

    def __call__(self, calls: Sequence[Any]) -> list[float]:
        self.rounds += 1
        return [self.cost(call.args[0]) for call in calls]


def first(clock: Clock, run: Any = lambda chosen: chosen, shape: plan.Shape = SHAPE) -> LaunchPlan:
    return autotune.first_plan(shape, ARCH, SMS, run, autotune.unchecked, lambda: clock)


def test_the_first_call_takes_what_is_fastest_and_later_ones_keep_it(folder: Path) -> None:
    clock = Clock("addmm")
    assert plan.choose(SHAPE, ARCH, SMS).path == "addmm"
    assert first(clock).path == "fused"
    assert clock.rounds == 2  # 2 + 1 + 1 ms a round, and 10 ms in all
    assert first(Clock("fused")).path == "fused"  # known
    table = json.loads((folder / "kernels" / f"{ARCH}.json").read_text())
    version = 100 * installed()[0] + installed()[1]
    assert table["rules"][0]["if"] | {"M": [257, 512], "sms": SMS, "triton": [version] * 2} == table["rules"][0]["if"]


@pytest.mark.parametrize(
    ("changed", "path", "is_timed"),
    [
        ("nothing", "fused", False),
        ("card", "addmm", True),
        ("driver", "addmm", True),
        ("triton", "addmm", True),
        ("mode", "addmm", False),  # "off" reads no table of the user
    ],
)
def test_a_later_run_reads_it_if_nothing_changed(
    changed: str, path: str, is_timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"card": "RTX A6000", "driver": "570.1"}
    monkeypatch.setattr(plan, "_machine", lambda: here)
    monkeypatch.setattr(autotune, "machine", lambda: here)
    first(Clock("addmm"))
    assert plan.choose(SHAPE, ARCH, SMS).path == "addmm"  # the table in memory is as it was read
    plan.forget()
    assert plan.choose(SHAPE, ARCH, SMS).path == "fused"
    match changed:
        case "card" | "driver":
            monkeypatch.setattr(plan, "_machine", lambda: here | {changed: "another"})
        case "triton":
            monkeypatch.setattr(plan, "installed", lambda: (99, 1))
        case "mode":
            monkeypatch.setenv(autotune.MODE, "off")
    plan.forget()
    clock = Clock("fused")
    assert first(clock).path == path
    assert bool(clock.rounds) == is_timed


def test_noise_does_not_change_the_tables_choice() -> None:
    assert first(Clock(lambda one: 0.99 if one.path == "fused" else 1.0)).path == "addmm"


@pytest.mark.parametrize("why", ["off", "cached", "few tokens", "deterministic", "capture"])
def test_nothing_is_timed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, M=128) if why == "few tokens" else SHAPE
    if why in ("off", "cached"):
        monkeypatch.setenv(autotune.MODE, why)
    if why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ran: list[LaunchPlan] = []
    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    clock = Clock("addmm")
    assert first(clock, ran.append, shape) == plan.choose(shape, ARCH, SMS)
    assert clock.rounds == 0
    assert len(ran) == (0 if why == "capture" else 1)  # which is checked all the same


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.MODE, "always")
    with pytest.warns(UserWarning, match="expected LORASB_TUNE to be one of on, cached, off, got 'always'"):
        assert autotune.mode() == "on"


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
@pytest.mark.parametrize("M", [1, 64, 512])
def test_only_code_that_was_executed_is_chosen(arch: str, M: int) -> None:
    """tcgen05 is for blocks of 64 rows and more."""
    for op in ("forward", "backward"):
        for dtype in ("bf16", "fp32"):
            shape = plan.Shape(op, dtype, M, 4096, 4096, 96)
            chosen = plan.choose(shape, arch, 148)
            for one in autotune.candidates(shape, chosen, arch):
                assert one.prep.block_m < 64
                assert one.path == "addmm" or one.gemm.block_m < 64


def test_a_new_architecture_has_its_familys_table() -> None:
    assert [plan.family(arch) for arch in ("sm_103", "sm_121", "sm_90", "interpreter")] == [
        "sm_100", "sm_120", "sm_90", "interpreter",
    ]  # fmt: skip
    assert plan.shipped_rules("sm_121") == plan.shipped_rules("sm_120") != ()


def test_what_does_not_run_or_is_wrong_is_left_out() -> None:
    """The fastest needs more shared memory than there is, and the second fastest computes something else."""
    shape, chosen = SHAPE, plan.choose(SHAPE, ARCH, SMS)
    plans = list(autotune.candidates(shape, chosen, ARCH, autotune.FIRST_GEMMS))
    assert len(plans) == 4

    def run(one: LaunchPlan) -> LaunchPlan:
        if one == plans[2]:
            raise RuntimeError("out of resource: shared memory")
        return one

    def check(found: LaunchPlan) -> None:
        if found == plans[3]:
            raise autotune.WrongResultError("y differs")

    tuned = autotune.fastest(shape, plans, run, check, Clock(lambda one: 10.0 - plans.index(one)))
    assert tuned is not None
    assert (tuned.best, tuned.before, tuned.after) == (plans[1], 10.0, 9.0)
    assert autotune.fastest(shape, plans[2:], run, check, Clock("fused")) is None


def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kernels").write_text("a file, where a folder has to be")
    with pytest.warns(UserWarning, match=r"the kernels' timings cannot be kept .*Set LORASB_CACHE"):
        assert first(Clock("addmm")).path == "fused"
    assert first(Clock("fused")).path == "fused"  # this process keeps it


@pytest.mark.parametrize("text", ["[]", "{", '{"rules": [{"path": "magic"}]}'])
@pytest.mark.filterwarnings("ignore:.*is not a table of kernels")
def test_a_broken_table_is_overwritten(text: str, folder: Path) -> None:
    path = folder / "kernels" / f"{ARCH}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert first(Clock("addmm")).path == "fused"
    assert len(plan.read_rules(path)) == 1


def test_a_second_shape_keeps_the_first(folder: Path) -> None:
    for shape in (SHAPE, replace(SHAPE, m=96), SHAPE):
        first(Clock("addmm"), shape=shape)
    rules = json.loads((folder / "kernels" / f"{ARCH}.json").read_text())["rules"]
    assert sorted(rule["if"]["m"] for rule in rules) == [48, 96]


@functools.cache
def computed(dtype: torch.dtype, ms: int, weight: bool) -> Any:
    cases = group_cases(40, 96, [80 - 16 * j for j in range(ms)], 24, dtype)
    if not weight:
        cases = [replace(case, weight=None) for case in cases]
    x = cases[0].x
    members = fused.members_of(operands_of(*cases))
    chosen = plan.choose(plan.Shape("forward", "fp32", 64, 96, 80, 24, ms), plan.INTERPRETER, 1)
    ys, us = launch.forward(x, members, chosen, Mask())
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for y in ys]
    gradients = launch.backward(dys, members, us, chosen, True, True, Mask())
    return x, members, (ys, us), dys, gradients


def kernels_case(dtype: torch.dtype = torch.float32, ms: int = 1, weight: bool = True) -> Any:
    """x, members, dy and u of a call, with the launchers' results by a safe plan, which a test may spoil."""
    return copy.deepcopy(computed(dtype, ms, weight))


@pytest.mark.parametrize(
    ("dtype", "ms", "weight"),
    [(torch.float32, 1, True), (torch.float32, 2, True), (torch.float16, 2, True), (torch.float16, 1, False)],
)
def test_right_results_pass(dtype: torch.dtype, ms: int, weight: bool) -> None:
    x, members, outputs, dys, gradients = kernels_case(dtype, ms, weight)
    autotune.check_forward(x, members, outputs)
    autotune.check_backward(dys, members, outputs[1], gradients)


# faults as a wrong kernel makes them
SPOILS = {"zero": torch.Tensor.zero_, "NaN": lambda y: y.fill_(torch.nan), "scale": lambda y: y.mul_(1.2)}


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("what", ["y", "dx", "dR"])
def test_wrong_results_are_found(what: str, kind: str) -> None:
    x, members, outputs, dys, gradients = kernels_case(ms=2)
    SPOILS[kind]({"y": outputs[0][1], "dx": gradients[0], "dR": gradients[1][1]}[what])
    check = functools.partial(autotune.check_forward, x, members, outputs)
    if what != "y":
        check = functools.partial(autotune.check_backward, dys, members, outputs[1], gradients)
    with pytest.raises(autotune.WrongResultError, match=f"{what} differs from torch's by up to"):
        check()


def test_no_judgment_where_torch_has_infinities() -> None:
    x, members, (ys, us), *_ = kernels_case()
    x[0, 0] = torch.inf
    autotune.check_forward(x, members, ([ys[0].clone()], us))
    ys[0].zero_()
    with pytest.raises(autotune.WrongResultError):  # of the other rows
        autotune.check_forward(x, members, (ys, us))
