"""What malloc would hold in a planned step: against memory that is written, and where it cannot be told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lorasb.app import plan
from lorasb.app.plan import HeldBytes, Request, find_gpu, malloc_counts, plan_memory

asks_malloc = pytest.mark.skipif(not malloc_counts(), reason="malloc is not glibc's")
LAYERS = """
import sys
import torch

def layers():
    "What each layer keeps lies in the hole of its temporary one, which is then too small for the next layer's."
    torch.empty(7 * 2**20).fill_(1)  # 28 MiB and freed: what follows is smaller, and lies in the heap
    kept = []
    for layer in range(40):
        temporary = torch.empty(5 * 2**18 + 4096 * layer).fill_(1)
        behind = torch.empty(5 * 2**17).fill_(1)  # larger than what kept ones leave: at the end of the heap
        del temporary
        kept += [torch.empty(3 * 2**18).fill_(1), behind]

if sys.argv[1] == "fake":
    from torch._subclasses.fake_tensor import FakeTensorMode
    from lorasb.app.plan import HeldBytes
    with FakeTensorMode(), HeldBytes() as live:
        layers()
    print(live.most, live.peak)
else:
    def size(name):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
    torch.ones(100).fill_(1)
    open("/proc/self/clear_refs", "w").write("5")
    before = size("VmRSS")
    layers()
    print(size("VmHWM") - before, 0)
"""


def sizes_of(kind: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", LAYERS, kind], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@asks_malloc
def test_what_is_held_is_what_written_tensors_would_take() -> None:
    (written, _), (most, peak) = sizes_of("real"), sizes_of("fake")
    assert most == pytest.approx(written, rel=0.03)
    assert most > 1.25 * peak


def test_a_refused_tensor_and_another_malloc_leave_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for refused, arena in ((12, 10**6), (0, 0)):
        info = SimpleNamespace(arena=0, hblkhd=0)
        libc = SimpleNamespace(
            malloc_trim=lambda pad: 0,
            mallinfo2=lambda found=info: found,
            posix_memalign=lambda *given, code=refused: code,
            free=lambda address: None,
            prctl=lambda *given: 0,
        )
        monkeypatch.setattr(plan, "_libc", lambda found=libc: found)
        with HeldBytes() as live:
            info.arena = arena
            torch.zeros(100_000)
        assert live.held is None


@pytest.fixture
def folder(tmp_path: Path) -> str:
    transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=300,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    return str(tmp_path)


@asks_malloc
def test_a_plan_takes_the_answer_of_its_process(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []
    asked = plan._answer
    monkeypatch.setattr(plan, "_answer", lambda process: answers.append(asked(process)) or answers[-1])
    found = plan_memory(Request(folder, r=8, batch=2, seq=64))
    assert answers == [found.reserve]
    assert found.asked
    assert 0 < found.reserve < 50e6  # a heap's page of small objects, and holes of a small model


@asks_malloc
def test_files_of_the_current_folder_are_no_modules(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inspect.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    with plan.heap_trial(Request(folder, r=8, batch=2, seq=64)) as held:
        assert held() is not None


def test_nobody_is_asked_about_a_card(folder: str) -> None:
    with plan.heap_trial(Request(folder, card=find_gpu("a6000"))) as held:
        assert held() is None


def test_a_process_that_fails_leaves_it_open(tmp_path: Path) -> None:
    with plan.heap_trial(Request(str(tmp_path / "nothing"))) as held:
        assert held() is None


@pytest.mark.parametrize(
    ("said", "code", "want"),
    [("7\n", 0, 7), ("7\nNone\n9\n8\n", 0, 9), ("", 0, None), ("None\n", 0, None), ("7\n", 1, None)],
)
def test_what_a_process_says(said: str, code: int, want: int | None) -> None:
    assert plan._answer(SimpleNamespace(communicate=lambda: (said, None), returncode=code)) == want  # type: ignore[arg-type]


def test_a_plan_that_fails_takes_its_process_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(plan.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(ValueError, match="cannot read the config"):
        plan_memory(Request(str(tmp_path / "nothing")))
    assert [process.poll() is not None for process in started] == [True] * malloc_counts()
