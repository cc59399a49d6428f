"""Autotuning with a fake clock: what the first call of a kind chooses, saves and refuses; and the tables."""

import copy
import errno
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import operands_of
from kernel_cases import group_cases
from lines import one_line
from reference import make_case
from storages import storage

from lorasb.backends import autotune
from lorasb.backends import triton as fused
from lorasb.compat.triton import installed, warn_once
from lorasb.kernels import linear as launch
from lorasb.kernels import plan
from lorasb.kernels.block_sizes import quantized_config
from lorasb.kernels.operands import NO_DROPOUT, Mask
from lorasb.kernels.plan import LaunchPlan
from lorasb.utils.atomic_files import CACHE_VARIABLE

SHAPE = plan.Shape("forward", "fp32", 512, 64, 48, 8)
LARGE = plan.Shape("forward", "bf16", 2048, 4096, 4096, 96)
ARCH, SMS = "sm_86", 84


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; no kind has been called yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(autotune.MODE, raising=False)
    monkeypatch.setattr(autotune, "_first", {})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    warn_once.cache_clear()
    plan.forget()
    yield tmp_path
    plan.forget()


def unchecked(_: object) -> None:
    """Check nothing."""


def write_table(folder: Path, text: str, arch: str = ARCH) -> Path:
    """Write a user's table and return its path."""
    path = folder / "kernels" / f"{arch}.json"
    path.parent.mkdir()
    path.write_text(text)
    return path


class Clock:
    """Report `cost` ms for each plan, or 2 for the path named `cost` and 1 for others; count the rounds."""

    def __init__(self, cost: str | Callable[[LaunchPlan], float]) -> None:
        self.cost = cost if callable(cost) else lambda one: 2.0 if one.path == cost else 1.0
        self.rounds = 0

    def __call__(self, calls: Sequence[Any]) -> list[float]:
        self.rounds += 1
        return [self.cost(call.args[0]) for call in calls]


def first(clock: Clock, run: Any = lambda chosen: chosen, shape: plan.Shape = SHAPE) -> LaunchPlan:
    return autotune.first_plan(shape, ARCH, SMS, run, unchecked, lambda: clock)


def test_the_first_call_takes_what_is_fastest_and_later_ones_keep_it(folder: Path) -> None:
    clock = Clock("addmm")
    assert plan.choose(SHAPE, ARCH, SMS).path == "addmm"
    assert first(clock).path == "fused"
    assert clock.rounds == autotune.LEAST_ROUNDS  # of 5 ms each; the budget is 10
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
        ("mode", "addmm", False),  # "off" does not read the user's table
    ],
)
def test_a_later_run_reads_it_if_nothing_changed(
    changed: str, path: str, is_timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"card": "RTX A6000", "driver": "570.1"}
    monkeypatch.setattr(plan, "_machine", lambda: here)
    monkeypatch.setattr(autotune, "machine", lambda: here)
    first(Clock("addmm"))
    assert plan.choose(SHAPE, ARCH, SMS).path == "addmm"  # the table in memory does not change
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


def test_short_calls_have_more_rounds() -> None:
    clock = Clock(lambda one: 0.4)
    first(clock)
    assert clock.rounds == 6  # of 4 x 0.4 ms each


def busy(slow: float) -> Clock:
    """A clock by which two calls in five take `slow` times as long."""
    calls = itertools.count(1)
    return Clock(lambda one: (2.0 if one.path == "addmm" else 1.0) * (slow if next(calls) % 5 in (0, 2) else 1.0))


def test_a_busy_card_decides_nothing(folder: Path) -> None:
    """The warning appears once for all kinds."""
    with one_line(r"another program seems to use the GPU: .* more than 20%.*`lorasb bench tune MODEL`"):
        for m in (48, 96):
            assert first(busy(4.0), shape=replace(SHAPE, m=m)).path == "addmm"
    assert not (folder / "kernels").exists()
    assert first(busy(1.1), shape=replace(SHAPE, m=80)).path == "fused"


@pytest.mark.parametrize("where", ["the clock", "a timed call", "the check"])
def test_a_card_that_is_too_small_takes_the_tables_choice(where: str, folder: Path) -> None:
    def no_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    clocks: dict[str, Any] = {"the clock": no_memory, "a timed call": lambda: no_memory, "the check": Clock}
    check = no_memory if where == "the check" else unchecked
    with one_line("too little free memory to time the kernels"):
        for m in (48, 96):
            shape = replace(SHAPE, m=m)
            found = autotune.first_plan(shape, ARCH, SMS, lambda chosen: chosen, check, clocks[where])
            assert found == plan.choose(shape, ARCH, SMS)
    assert not (folder / "kernels").exists()


@pytest.mark.parametrize(("size", "flushed"), [(72 << 20, 144 << 20), (6 << 20, 64 << 20), (None, 128 << 20)])
def test_the_cold_cache_is_twice_the_cards(size: int | None, flushed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(**({} if size is None else {"L2_cache_size": size}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    clock = autotune.CudaClock(torch.device("meta"))
    assert clock.flushed.numel() == flushed


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
    assert len(ran) == (0 if why == "capture" else 1)  # still checked


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.MODE, "always")
    with pytest.warns(UserWarning, match="expected LORASB_TUNE to be one of on, cached, off, got 'always'"):
        assert autotune.mode() == "on"


UNEXECUTED = (
    {"path": "fused", "gemm": {"block_m": 128, "block_n": 128, "block_k": 64, "group": 8, "warps": 8, "stages": 3}},
    {"prep": {"block_m": 64, "block_k": 64, "warps": 8, "stages": 3}},
    {"path": "tma"},
    {"weights": "inline"},
)


@pytest.mark.parametrize("rule", [{}, *UNEXECUTED], ids=lambda rule: next(iter(rule), "shipped"))
@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
@pytest.mark.parametrize("M", [1, 64, 512])
def test_only_code_that_was_executed_is_chosen(arch: str, M: int, rule: dict[str, Any], folder: Path) -> None:
    """Blocks of 64 rows and more would use tcgen05: neither our tables nor a user's can choose them."""
    write_table(folder, json.dumps({"rules": [rule]}), arch)
    for op, dtype, quant in itertools.product(("forward", "backward"), ("bf16", "fp32"), ("none", "4bit")):
        shape = plan.Shape(op, dtype, M, 4096, 4096, 96, quant=quant)
        chosen = plan.choose(shape, arch, 148)
        for one in autotune.candidates(shape, chosen, arch):
            assert one.path != "tma"
            assert one.prep.block_m < 64
            assert one.gemm.block_m < 64
            if quant == "4bit" and one.weights == "inline":
                assert quantized_config(M, 4 if dtype == "fp32" else 2).block_m < 64


def test_launches_overlap_where_the_card_and_its_driver_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(LARGE, M=16)
    for arch in ("sm_86", "sm_90"):
        (folder / "kernels").mkdir(exist_ok=True)
        (folder / "kernels" / f"{arch}.json").write_text(json.dumps({"rules": [{"overlaps": True, "path": "tma"}]}))
    assert not plan.choose(few, "sm_86", 84).overlaps
    assert plan.choose(few, "sm_86", 84).path == "fused"
    for driver, overlaps in (("545.23", True), ("535.104", False)):  # a graph captures overlaps from CUDA 12.3 on
        monkeypatch.setattr(plan, "_machine", lambda driver=driver: {"driver": driver})
        chosen = plan.choose(few, "sm_90", 132)
        assert (chosen.overlaps, chosen.path) == (overlaps, "tma" if overlaps else "fused")
        assert plan.choose(replace(few, quant="4bit"), "sm_90", 132).path == "fused"


def test_a_new_architecture_has_its_familys_table() -> None:
    assert [plan.family(arch) for arch in ("sm_103", "sm_121", "sm_90", "sm_86")] == [
        "sm_100", "sm_120", "sm_90", "sm_86",
    ]  # fmt: skip
    assert plan.shipped_rules("sm_121") == plan.shipped_rules("sm_120") != ()


@pytest.mark.parametrize("arch", ["sm_87", "sm_99", "sm_110", "sm_130"])
def test_an_unknown_architecture_takes_cublas_and_says_so_once(arch: str) -> None:
    """The thin products have blocks that compile to mma.sync; nothing is timed."""
    with one_line(f"kernels were not tested for {arch}: cuBLAS computes all products"):
        for op, M, quant in itertools.product(("forward", "backward"), (1, 16, 2048), ("none", "4bit")):
            shape = plan.Shape(op, "bf16", M, 4096, 4096, 96, quant=quant)
            chosen = plan.choose(shape, arch, 200)
            assert (chosen.path, chosen.weights, chosen.overlaps) == ("addmm", "scratch", False)
            assert max(chosen.prep.block_m, chosen.gemm.block_m) < 64
            clock = functools.partial(pytest.fail, "timed")
            assert autotune.first_plan(shape, arch, 200, lambda one: one, unchecked, clock) == chosen


def test_what_does_not_run_or_is_wrong_is_left_out() -> None:
    """The fastest needs more shared memory than there is, and the second fastest computes a wrong result."""
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


def test_a_read_only_cache_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failed write names a different temporary file."""
    names = itertools.count()

    def write(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path.with_name(f".{next(names)}")))

    monkeypatch.setattr(autotune, "write_text", write)
    with one_line(r"the kernels' timings cannot be saved in .*kernels \(Read-only file system\).*Set LORASB_CACHE"):
        for m in (48, 96):
            assert first(Clock("addmm"), shape=replace(SHAPE, m=m)).path == "fused"
        assert first(Clock("fused"), shape=replace(SHAPE, m=48)).path == "fused"  # this process still uses its choice
    assert next(names) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rules": [{"path": "magic"}]}',
        '{"rules": [{"weights": "whole"}]}',
        '{"rules": [{"if": {"N": 3}}]}',
        '{"rules": [{"gemm": {}}]}',
        '{"rules": [{"if": {"M": [1]}, "path": "addmm"}]}',
        '{"rules": [{"if": {"M": ["1", null]}, "path": "addmm"}]}',
        '{"rules": [{"if": {"M": [1, "2"]}, "path": "addmm"}]}',
        '{"rules": [{"if": [], "path": "addmm"}]}',
        '{"rules": [{"prep": {"block_m": "16", "block_k": 64, "warps": 4, "stages": 3}}]}',
        *(
            json.dumps({"rules": [{"prep": {"block_m": 16, "block_k": 64, "warps": 4, "stages": 3} | change}]})
            for change in (
                {"block_m": 0},
                {"block_m": None},
                {"block_k": 48},
                {"warps": 3},
                {"stages": -1},
                {"stages": True},
            )
        ),
    ],
)
def test_a_broken_table_is_left_out_and_named_and_overwritten(text: str, folder: Path) -> None:
    path = write_table(folder, text)
    with one_line(r"sm_86\.json cannot be read as a table of kernels .*bench tune"):
        for M in (1024, 2048):
            assert plan.choose(replace(LARGE, M=M), ARCH, SMS).path == "fused"
        assert first(Clock("addmm")).path == "fused"
    assert len(plan.read_rules(path)) == 1


def test_an_unreadable_table_is_left_out_and_named(folder: Path) -> None:
    (folder / "kernels").write_text("a file, where a folder has to be: nobody's table")
    assert plan.user_rules(ARCH) == ()
    plan.forget()
    (folder / "kernels").unlink()
    (folder / "kernels" / f"{ARCH}.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"sm_86\.json cannot be read as a table of kernels \(Is a directory\)"):
        assert plan.choose(LARGE, ARCH, SMS).path == "fused"


def test_a_users_table_comes_first(folder: Path) -> None:
    rule = {"if": {"M": [1025, 2048], "n": 4096, "sms": 84}, "path": "addmm"}
    write_table(folder, json.dumps({"arch": ARCH, "rules": [rule]}))
    shipped, chosen = plan.choose(LARGE, ARCH, 80), plan.choose(LARGE, ARCH, 84)
    assert (shipped.path, chosen.path) == ("fused", "addmm")
    assert chosen.gemm == shipped.gemm


def test_every_shipped_table_is_read() -> None:
    archs = sorted(path.stem for path in plan.TABLES.glob("sm_*.json"))
    assert archs == ["sm_100", "sm_120", "sm_80", "sm_86", "sm_89", "sm_90"]
    for arch in archs:
        assert json.loads((plan.TABLES / f"{arch}.json").read_text())["arch"] == arch
        assert plan.choose(LARGE, arch, 84).gemm in {rule.gemm for rule in plan.shipped_rules(arch)}


@pytest.mark.parametrize(("arch", "slow"), [("sm_80", True), ("sm_86", True), ("sm_89", True), ("sm_120", False)])
def test_cublas_multiplies_where_triton_does_not_prefetch(
    arch: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, tiles = {}, {}
    for version, M in itertools.product(((3, 7), (3, 8)), (128, 256)):
        monkeypatch.setattr(plan, "installed", lambda version=version: version)
        chosen = plan.choose(replace(LARGE, M=M), arch, 84)
        paths[version[1], M], tiles[version[1]] = chosen.path, chosen.gemm.block_m
    assert paths == {(7, 128): "fused", (7, 256): "addmm" if slow else "fused", (8, 128): "fused", (8, 256): "fused"}
    assert tiles == {7: 64 if slow else 128, 8: 128}  # forward, the tile whose simulated bound is highest
    assert plan.bucket(autotune.LEAST_TOKENS // 2 + 1) == 256  # calls with 129 tokens or more are timed


def test_a_second_shape_keeps_the_first(folder: Path) -> None:
    for shape in (SHAPE, replace(SHAPE, m=96), SHAPE):
        first(Clock("addmm"), shape=shape)
    rules = json.loads((folder / "kernels" / f"{ARCH}.json").read_text())["rules"]
    assert sorted(rule["if"]["m"] for rule in rules) == [48, 96]


@functools.cache
def computed(dtype: torch.dtype, ms: int, weight: bool, mask: Mask) -> Any:
    cases = group_cases(40, 96, [80 - 16 * j for j in range(ms)], 24, dtype)
    if not weight:
        cases = [replace(case, weight=None) for case in cases]
    x = cases[0].x
    members = fused.members_of(operands_of(*cases))
    chosen = plan.choose(plan.Shape("forward", "fp32", 64, 96, 80, 24, ms), plan.INTERPRETER, 1)
    ys, us = launch.forward(x, members, chosen, mask)
    dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for y in ys]
    gradients = launch.backward(dys, members, us, chosen, True, True, mask)
    return x, members, (ys, us), dys, gradients


def kernels_case(dtype: torch.dtype = torch.float32, ms: int = 1, weight: bool = True, mask: Mask = NO_DROPOUT) -> Any:
    """x, members and dy's of a call, and the launchers' results by a safe plan; tests may modify the results."""
    return copy.deepcopy(computed(dtype, ms, weight, mask))


@pytest.mark.parametrize(
    ("dtype", "ms", "weight"),
    [(torch.float32, 1, True), (torch.float32, 2, True), (torch.float16, 2, True), (torch.float16, 1, False)],
)
def test_right_results_pass(dtype: torch.dtype, ms: int, weight: bool) -> None:
    x, members, outputs, dys, gradients = kernels_case(dtype, ms, weight)
    autotune.check_forward(x, members, NO_DROPOUT, outputs)
    autotune.check_backward(dys, members, outputs[1], NO_DROPOUT, gradients)


def test_masked_results_pass_by_their_mask_alone() -> None:
    """Two members with a seed each."""
    mask = Mask(0.5, (3, 1 << 40))
    x, members, outputs, dys, gradients = kernels_case(ms=2, mask=mask)
    autotune.check_forward(x, members, mask, outputs)
    autotune.check_backward(dys, members, outputs[1], mask, gradients)
    for wrong in (Mask(0.5, (3, 4)), NO_DROPOUT):
        with pytest.raises(autotune.WrongResultError):
            autotune.check_forward(x, members, wrong, outputs)
        with pytest.raises(autotune.WrongResultError, match="dx"):
            autotune.check_backward(dys, members, outputs[1], wrong, gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_calls_over_4_bits_are_checked(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference uses W as dequantized by eager torch."""
    case = replace(make_case((40,), 64, 48, 16, torch.float32), weight=storage(48, 64, "nf4", 64, False))
    operands = operands_of(case, dropout=dropout, seeds=torch.tensor([3]) if dropout else None)
    seen: list[str] = []

    def first_plan(op: str, rows: torch.Tensor, members: Any, mask: Any, run: Any, check: Any, quant: str) -> Any:
        seen.append(f"{op} {quant}")
        chosen = fused.plan_of(op, rows, members, quant, mask.dropout > 0.0)
        found = run(chosen)
        check(found)
        found[0].mul_(1.2)  # y, dx
        with pytest.raises(autotune.WrongResultError):
            check(found)
        return chosen

    monkeypatch.setattr(fused, "_first_plan", first_plan)
    y, u = fused.forward(case.x, operands)
    fused.backward([torch.ones_like(y)], [u], operands, True, True)
    assert seen == ["forward 4bit", "backward 4bit"]


@pytest.mark.parametrize("trained", [True, False])
def test_the_first_backward_of_a_kind_is_checked_without_what_was_not_saved(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a frozen R, the forward saves no u."""
    operands = operands_of(make_case((40,), 64, 48, 16, torch.float32))
    chosen = plan.choose(plan.Shape("backward", "fp32", 64, 64, 48, 16), plan.INTERPRETER, 1)
    found: list[Any] = []

    def first_plan(op: str, rows: torch.Tensor, members: Any, mask: Any, run: Any, check: Any, *quant: str) -> Any:
        if op == "backward":
            found.append(run(chosen))
            check(found[0])
        return chosen

    def first_check(kind: Any, rows: torch.Tensor, check: Any) -> None:
        assert not trained  # calls that compute no dR choose no plan
        check()

    monkeypatch.setattr(fused, "_first_plan", first_plan)
    monkeypatch.setattr(autotune, "first_check", first_check)
    monkeypatch.setattr(autotune, "check_backward", lambda *given: found.append(given[-1]))
    y, u = fused.forward(torch.randn(40, 64), operands)
    dx, *_ = fused.backward([torch.ones_like(y)], [u if trained else u[:0]], operands, True, trained)
    assert torch.equal(found[0][0], dx)
    assert len(found[0][1]) == trained


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("quantized", [False, True])
def test_calls_with_an_r_for_each_row_are_checked(
    quantized: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members, or one over 4 bits; one adapter has no rows, and one row has no adapter."""
    index, g = [2, -1, 0, 2], torch.Generator().manual_seed(0)
    cases = [
        make_case((len(index), tokens), 64, 48, 16, torch.float32, seed=seed) for seed in range(1 if quantized else 2)
    ]
    if quantized:
        cases[0].weight = storage(48, 64)
    operands = operands_of(*cases, index=index)._replace(cores=[torch.randn(3, 16, 16, generator=g) for _ in cases])
    checks: list[Callable[[], None]] = []
    monkeypatch.setattr(autotune, "first_check", lambda shape, rows, check: checks.append(check))
    found = fused.forward(cases[0].x, operands)
    ys, us = found[: len(cases)], found[len(cases) :]
    dx, *dcores = fused.backward([torch.ones_like(y) for y in ys], us, operands, True, True)
    assert quantized or len(checks) == 2
    for check, outputs in zip((checks[0], checks[-1]), (ys, (dx, dcores[-1][2])), strict=True):
        fails_if_spoiled(check, outputs)


def fails_if_spoiled(check: Callable[[], None], outputs: Sequence[torch.Tensor]) -> None:
    """Run a check on right outputs, then with each output in turn multiplied by 1.2."""
    check()
    for output in outputs:
        right = output.clone()
        output.mul_(1.2)
        with pytest.raises(autotune.WrongResultError):
            check()
        output.copy_(right)


def gradient_arguments() -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(24, 20, generator=g), torch.randn(24, 70, generator=g), torch.ones(20, 70), False


def packed_arguments() -> tuple[Any, ...]:
    weight = storage(48, 64)
    return weight.tensors, weight.layout(torch.float32), 48, 64, torch.float32


KERNELS: dict[str, tuple[Callable[[], tuple[Any, ...]], str, str, Callable[..., Any]]] = {
    "gradient_add": (
        gradient_arguments,
        "weight_gradient",
        "gradient_add",
        lambda right, dy, x, total, *_: total.zero_(),
    ),
    "gradient_signs": (
        gradient_arguments,
        "weight_gradient",
        "gradient_signs",
        lambda right, *given: (~right(*given)[0], *right(*given)[1:]),
    ),
    "dequantize": (packed_arguments, "linear_quantized", "dequantized", lambda right, *given: right(*given).mul(2.0)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_initialization_are_checked_before_they_change_a_sum(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wrong kernel is found before it changes a sum."""
    arguments, module, attribute, fault = KERNELS[name]
    given, kernels, checks = arguments(), getattr(fused._kernels(), module), []
    monkeypatch.setattr(autotune, "first_check", lambda kind, rows, check: (check(), checks.append(check)))
    getattr(fused, name)(*given)
    assert len(checks) == 1
    before = copy.deepcopy(given)
    monkeypatch.setattr(kernels, attribute, functools.partial(fault, getattr(kernels, attribute)))
    with pytest.raises(autotune.WrongResultError):
        getattr(fused, name)(*given)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True) if isinstance(pair[0], torch.Tensor))


# faults that a wrong kernel would cause
SPOILS = {"zero": torch.Tensor.zero_, "NaN": lambda y: y.fill_(torch.nan), "scale": lambda y: y.mul_(1.2)}


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("what", ["y", "dx", "dR"])
def test_wrong_results_are_found(what: str, kind: str) -> None:
    x, members, outputs, dys, gradients = kernels_case(ms=2)
    SPOILS[kind]({"y": outputs[0][1], "dx": gradients[0], "dR": gradients[1][1]}[what])
    check = functools.partial(autotune.check_forward, x, members, NO_DROPOUT, outputs)
    if what != "y":
        check = functools.partial(autotune.check_backward, dys, members, outputs[1], NO_DROPOUT, gradients)
    with pytest.raises(autotune.WrongResultError, match=f"{what} differs from torch's by up to"):
        check()


def test_no_judgment_where_fp16_overflows() -> None:
    """GradScaler's first step makes dx overflow on purpose."""
    want, size = torch.tensor([[1e5, 10.0]]), torch.tensor([[1e5, 10.0]])
    autotune._check("dx", torch.tensor([[torch.inf, 10.0]]).half(), want, size)
    with pytest.raises(autotune.WrongResultError, match="dx differs"):
        autotune._check("dx", torch.tensor([[torch.inf, torch.inf]]).half(), want, size)
    with pytest.raises(autotune.WrongResultError, match="dx differs"):
        autotune._check("dx", torch.tensor([[torch.inf, 10.0]]).bfloat16(), want, size)


def test_a_fault_while_tiles_are_timed_is_no_tile_that_does_not_fit(folder: Path) -> None:
    def faulty(chosen: LaunchPlan) -> LaunchPlan:
        if chosen.path == "addmm":
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return chosen

    with pytest.raises(RuntimeError, match="illegal memory access"):
        first(Clock("addmm"), faulty)


def test_a_kernel_with_a_bias_is_checked_though_one_without_was(folder: Path) -> None:
    checked: list[object] = []
    for has_bias in (False, True, True):
        few = replace(SHAPE, M=16)  # not timed
        autotune.first_plan(few, ARCH, SMS, lambda one: one, checked.append, lambda: Clock("addmm"), has_bias)
    assert len(checked) == 2


def test_no_judgment_where_torch_has_infinities() -> None:
    x, members, (ys, us), *_ = kernels_case()
    x[0, 0] = torch.inf
    autotune.check_forward(x, members, NO_DROPOUT, ([ys[0].clone()], us))
    ys[0].zero_()
    with pytest.raises(autotune.WrongResultError):  # the other rows are wrong
        autotune.check_forward(x, members, NO_DROPOUT, (ys, us))
