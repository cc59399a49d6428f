"""`lorasb bench tune` with a clock of its own: what is fastest is taken, what fails is left out, the table is read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import make

from lorasb.app import cli, tune_kernels
from lorasb.kernels import plan
from lorasb.utils.atomic_files import CACHE_VARIABLE

SHAPE = plan.Shape("forward", "fp32", 32, 64, 48, 8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    plan.forget()
    yield tmp_path
    plan.forget()


def write(shape: plan.Shape) -> Path:
    found = tune_kernels.tune([shape], plan.INTERPRETER, 1, "cpu", lambda call: 1.0)
    return tune_kernels.write(found, plan.INTERPRETER, 1, "a GPU")


def clock(times: list[float]) -> Callable[[Callable[[], object]], float]:
    """Really runs each candidate, and says that it took the next of these times."""
    left = iter(times)

    def timer(call: Callable[[], object]) -> float:
        call()
        return next(left)

    return timer


def test_the_fastest_is_written_and_taken_from_then_on(folder: Path) -> None:
    before = plan.choose(SHAPE, plan.INTERPRETER, 1)
    options = list(tune_kernels.candidates(SHAPE, before))
    times = [5.0] * len(options)
    times[3] = 1.0
    (found,) = tune_kernels.tune([SHAPE], plan.INTERPRETER, 1, "cpu", clock(times))
    assert (found.before, found.after, found.best) == (5.0, 1.0, options[3])
    path = tune_kernels.write([found], plan.INTERPRETER, 1, "a GPU")
    assert path == folder / "kernels" / "interpreter.json"
    assert plan.choose(SHAPE, plan.INTERPRETER, 1) == options[3]
    assert plan.choose(SHAPE, plan.INTERPRETER, 2) == before
    assert json.loads(path.read_text())["measured"] is True


def test_backward_and_groups_are_timed_too() -> None:
    shapes = list(tune_kernels.shapes_of([(64, (48,)), (64, (32, 32))], 8, [20, 30, 1], "fp32"))
    assert {(s.op, s.M, s.members) for s in shapes} == {
        (op, M, k) for op in ("forward", "backward") for M in (32, 1) for k in (1, 2)
    }
    shapes = [shape for shape in shapes if shape.M == 1]  # quicker for the interpreter
    found = tune_kernels.tune(shapes, plan.INTERPRETER, 1, "cpu", lambda call: (call(), 1.0)[1])
    assert [one.shape for one in found] == shapes


def test_what_does_not_run_is_left_out() -> None:
    calls = iter(range(100))

    def timer(call: Callable[[], object]) -> float:
        if next(calls) != 2:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    before = plan.choose(SHAPE, plan.INTERPRETER, 1)
    (found,) = tune_kernels.tune([SHAPE], plan.INTERPRETER, 1, "cpu", timer)
    assert found.best == list(tune_kernels.candidates(SHAPE, before))[2]


def test_a_second_run_keeps_the_other_shapes() -> None:
    other = plan.Shape("forward", "fp32", 32, 64, 96, 8)
    for shape in (SHAPE, other, SHAPE):
        path = write(shape)
    rules = json.loads(path.read_text())["rules"]
    assert [rule["if"]["m"] for rule in rules] == [48, 96]


def test_layers_of_a_model() -> None:
    sizes = {64: ((64,), (32,), (64, 32, 32), (96,), (96, 96)), 96: ((64,),)}
    found = tune_kernels.layers_of(make("llama").model.layers[0])
    assert sorted(found) == sorted((n, ms) for n, all_ms in sizes.items() for ms in all_ms)


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what it needs")
    monkeypatch.setattr("sys.argv", ["lorasb", "bench", "tune"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", '{"rules": [{"path": "magic"}]}'])
@pytest.mark.filterwarnings("ignore:.*is not a table of kernels")
def test_a_broken_table_is_written_anew(text: str, folder: Path) -> None:
    path = plan.user_table(plan.INTERPRETER)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    write(SHAPE)
    assert len(plan.read_rules(path)) == 1
