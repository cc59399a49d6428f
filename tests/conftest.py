"""Fixtures for all tests. Uninitialized memory is poisoned; the slowest files run first. Helpers: tests/support."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment  # before anything reads it
import interpreted_language
import pytest
import torch
import transformers
from measuring import SETS, kernels
from models import llama
from tiny_run import WORDS

from lorasb.backends import eager as by_torch
from lorasb.layers import linear_group

pytest.register_assert_rewrite("adapters", "finetune_runs", "linear_groups")  # so that their asserts show what differs

# FakeTensorMode installs a device guard for CUDA. If the process's first backward came after that, it would start a
# thread for CUDA, and forks of the process could not compute gradients.
torch.ones((), requires_grad=True).backward()

HERE = Path(__file__).parent
LONGEST = (
    "kernels/test_static_report.py",
    "repo/test_docs.py",
    "distributed/test_training.py",
    "app/test_commands.py",
    "distributed/test_process_group.py",
    "repo/test_examples.py",
    "export/test_gguf.py",
    "repo/test_imports.py",
    "kernels/test_linear.py",
    "training/test_training_stacks.py",
    "layers/test_linear_group.py",
    "ops/test_linear.py",
    "ops/test_linear_quantized.py",
    "tuner/test_fresh_heads.py",
    "app/test_finetune.py",
    "app/test_run_folder.py",
)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Skip fsync: tests need not survive a power cut, and each file written would wait milliseconds for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorasb.utils.atomic_files.os.fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN, so that reads of uninitialized memory are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["eager", *SETS])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Eager, then the C++ kernels with every instruction set of this processor."""
    with kernels(request.param) as name:
        yield name


@pytest.fixture(params=[True, False], ids=["composed", "function"])
def composed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths of calls on a CPU: composed of torch's ops, as for small x, or with lorasb's own backward."""
    monkeypatch.setattr(by_torch, "SMALL_BYTES", 2**40 if request.param else 0)
    return request.param


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute layers that read the same input together, as on machines with a GPU."""
    monkeypatch.setattr(linear_group, "wanted", lambda *group: True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--ptx ARCH`: run the kernels as compiled for an architecture, executed instruction by instruction."""
    parser.addoption(
        "--ptx", metavar="ARCH", help="execute kernels as compiled for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Install compiled kernels with --ptx; else patch the language of interpreted kernels once per launch."""
    config.ptx_executor = None  # type: ignore[attr-defined]
    if os.environ["TRITON_INTERPRET"] == "1":
        interpreted_language.install()
    if environment.PTX:
        from benchmarks.kernels.ptx import plugin

        try:
            config.ptx_executor = plugin.install(environment.PTX)  # type: ignore[attr-defined]
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Any:
    """With --ptx, the object that compiles and executes kernels; else None."""
    return request.config.ptx_executor  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was executed, if any kernels were."""
    executor = getattr(config, "ptx_executor", None)
    if executor is not None and executor.launches:
        terminalreporter.write_line(executor.summary())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a tokenizer of words and characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder, letters = tmp_path_factory.mktemp("tiny"), [chr(code) for code in range(32, 127)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, *letters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    llama(vocab_size=len(vocabulary), eos_token_id=1, bos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file: "copy WORD" -> "WORD", thirty times."""
    file = tmp_path_factory.mktemp("data") / "copy.jsonl"
    rows = [{"prompt": f"copy {WORDS[i % 10]} {i % 7}", "completion": WORDS[i % 10]} for i in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that no process is still running one when the others are done."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(HERE).as_posix(), len(LONGEST)))
