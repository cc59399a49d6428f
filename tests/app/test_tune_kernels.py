"""`lorasb bench tune` with a fake clock: every kind of layer is timed, and what fails is left out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from models import make

from lorasb.app import cli, tune_kernels
from lorasb.backends import autotune
from lorasb.kernels import plan
from lorasb.utils.atomic_files import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    plan.forget()
    yield tmp_path
    plan.forget()


def clock(calls: Sequence[autotune.Call]) -> list[float]:
    """Return the same time for every call. Each has already run once, to check its result."""
    return [10.0] * len(calls)


def test_every_kind_of_layer_is_a_case() -> None:
    cases = list(tune_kernels.cases_of([(64, (48,)), (64, (32, 16))], 8, [300, 400, 1], "fp32"))
    kinds = {(shape.op, shape.M, ms, shape.quant, shape.dropout) for shape, ms in cases}
    plain = {(op, M, ms, "none", False) for op in tune_kernels.OPS for M in (512, 1) for ms in ((48,), (32, 16))}
    masked = {(op, 512, ms, "none", True) for op in tune_kernels.OPS for ms in ((48,), (32, 16))}
    four_bits = {(op, M, (48,), "4bit", False) for op in tune_kernels.OPS for M in (512, 1)}
    assert kinds == plain | masked | four_bits
    assert len(cases) == len(kinds)
    assert all(shape.m == sum(ms) for shape, ms in cases)


def test_every_case_runs_with_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of unequal members, dropout and 4 bits, in both directions."""
    monkeypatch.setattr(autotune, "LEAST_TOKENS", 32)
    monkeypatch.setattr(autotune, "GEMMS", autotune.GEMMS[-1:])
    monkeypatch.setattr(autotune, "PREPS", autotune.PREPS[:1])
    cases = list(tune_kernels.cases_of([(64, (48,)), (64, (32, 16))], 8, [20], "fp32"))
    found = tune_kernels.tune(cases, plan.INTERPRETER, 1, "cpu", clock)
    assert [one.shape for one in found] == [shape for shape, _ in cases]
    assert all(one.before == one.after == 10.0 for one in found)


def test_a_case_that_the_cards_memory_does_not_hold_is_skipped() -> None:
    def small(calls: Sequence[autotune.Call]) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases = list(tune_kernels.cases_of([(64, (48,))], 8, [1], "fp32"))[:1]
    assert tune_kernels.tune(cases, plan.INTERPRETER, 1, "cpu", small) == []


def test_layers_of_a_model() -> None:
    sizes = {64: ((64,), (32,), (64, 32, 32), (96,), (96, 96)), 96: ((64,),)}
    found = tune_kernels.layers_of(make("llama").model.layers[0])
    assert sorted(found) == sorted((n, ms) for n, all_ms in sizes.items() for ms in all_ms)


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    monkeypatch.setattr("sys.argv", ["lorasb", "bench", "tune"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "needs a CUDA GPU" in capsys.readouterr().err
