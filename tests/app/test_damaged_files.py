"""Input files, damaged in hundreds of ways: a documented error that names the file, or a result, nothing else."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import layers
from models import logits, make, patched
from safetensors.torch import load_file, save_file
from tolerances import check_equal
from torch import nn

import lorasb
from lorasb.app import results, run_folder
from lorasb.app.data import read_data
from lorasb.app.evaluation import Evaluation
from lorasb.app.run_folder import RunFolder, read_record
from lorasb.app.settings import Settings, read_config
from lorasb.config.adapter import LoRASBConfig
from lorasb.export.lora import export_lora

DOCUMENTED = (ValueError, OSError, TypeError, ImportError)
counts = pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.long)])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "é\u2028", "\ud800", "(", "(a+)+$", [], [[]], [None],
    {}, {"a": {}}, {"": 0}, ["x"] * 50,
)  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip bits; remove, repeat or insert bytes; or return another encoding or kind of file."""
    kind = draw.randrange(8)
    at = draw.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + draw.randrange(1, 20) :]
    if kind == 2:
        return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + data[at:]
    if kind == 3:
        return data[:at] + data[: draw.randrange(40)] + data[at:]
    if kind == 4:
        return draw.choice(
            (b"", b"\x1f\x8b\x08\x00", b"\xff\xfe{\x00}\x00", b"null", b"[" * 100_000, b'"\xe9"', b"\0" * 9)
        )
    changed = bytearray(data)
    for _ in range(1 if kind < 7 else 30):
        changed[draw.randrange(min(len(changed), 4096 if draw.random() < 0.7 else len(changed)))] ^= (
            1 << draw.randrange(8)
        )
    return bytes(changed)


def damaged_json(value: Any, draw: random.Random) -> Any:
    """Return a JSON value with one of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    place, parents = value, []
    while isinstance(place, dict | list) and place and (not parents or draw.random() < 0.6):
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        parents.append((place, key))
        place = place[key]
    if not parents:
        return draw.choice(ODD)
    owner, key = parents[-1]
    kind = draw.randrange(4)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    else:
        owner[key] = draw.choice(ODD)
    return value


def damage_tensors(file: Path, draw: random.Random) -> None:
    """Remove a factor, duplicate it under another name, change its shape, dtype or values, or remove all factors."""
    tensors = load_file(file)
    key = draw.choice(sorted(tensors))
    value, other = tensors[key], draw.choice((f"{key}x", key.removeprefix("base_model."), f"{key}.other", ""))
    damaged: tuple[dict[str, torch.Tensor], ...] = (
        {name: tensor for name, tensor in tensors.items() if name != key},
        tensors | {other: value.clone()},
        tensors | {key: value[:-1].clone() if len(value) else value},
        tensors | {key: value.reshape(-1).clone()},
        tensors | {key: value.to(draw.choice((torch.int64, torch.bool, torch.float64, torch.float16)))},
        tensors | {key: torch.full_like(value, draw.choice((0, 1)))},
        tensors | {key: torch.zeros(0)},
        {},
    )
    save_file(draw.choice(damaged), file)


def damage(file: Path, draw: random.Random) -> None:
    structured = file.suffix in (".json", ".safetensors") and draw.random() < 0.6
    if structured and file.suffix == ".json":
        text = json.dumps(damaged_json(json.loads(file.read_text()), draw))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif structured:
        damage_tensors(file, draw)
    else:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(damaged_bytes(data, draw))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model with an adapter, and that adapter."""
    model, folder = patched(), tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model, folder


def load_adapter(_: nn.Module, folder: Path) -> None:
    try:
        theirs = json.loads((folder / CONFIG).read_text())["peft_type"] != "LORASB"
    except (ValueError, KeyError, TypeError, RecursionError):
        theirs = True
    if theirs:  # PEFT itself reads this much before it knows the adapter's type
        return
    base, plain = make("llama"), make("llama")
    try:
        loaded = peft.PeftModel.from_pretrained(base, folder)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(plain))
        logits(loaded)
        loaded.unload()
    finally:
        assert not layers(base), "the base is still patched"
        check_equal(dict(base.state_dict()), dict(plain.state_dict()))


def load_bank(model: nn.Module, folder: Path) -> None:
    bank = lorasb.AdapterBank(copy.deepcopy(model), "default")
    bank.add("kept")
    report = bank.load(folder.parent)
    assert set(report.loaded) | set(report.failed) == {"adapter", "good"}
    assert "good" in report.loaded, report.failed


READERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "adapter": load_adapter,
    "export": lambda _, folder: export_lora(folder, folder / "lora", quiet=True),
    "bank": load_bank,
    "config": lambda _, folder: LoRASBConfig.from_pretrained(str(folder)),
}


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("name", READERS)
@counts
@pytest.mark.filterwarnings("ignore")
def test_adapters(adapter: tuple[nn.Module, Path], tmp_path: Path, name: str, file: str, count: int) -> None:
    model, whole = adapter
    for seed in range(count):
        folder = tmp_path / str(seed) / "adapter"
        shutil.copytree(whole, folder)
        if name == "bank":
            shutil.copytree(whole, folder.with_name("good"))
        damage(folder / file, random.Random(f"{name} {file} {seed}"))
        attempt(lambda: READERS[name](model, folder), f"{name}, {file}, seed {seed}")  # noqa: B023
        shutil.rmtree(folder.parent)


def attempt(call: Callable[[], Any], where: str, names: str | None = None) -> None:
    """Run a call that may raise a documented error, with `names` in its message."""
    try:
        call()
    except DOCUMENTED as error:
        said = str(error)
        if (
            isinstance(error, UnicodeError | json.JSONDecodeError)
            or not said.strip()
            or (names and names not in said and not said.startswith("--"))
        ):
            raise AssertionError(f"{where}: {error!r} does not say what is wrong with which file") from error
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


@counts
def test_checkpoints(base: Settings, stopped: Path, tmp_path: Path, count: int) -> None:
    files = [f.relative_to(stopped) for f in sorted((stopped / "checkpoints").rglob("*")) if f.is_file()]
    for seed in range(count):
        draw, folder = random.Random(f"checkpoints {seed}"), tmp_path / str(seed)
        shutil.copytree(stopped, folder)
        changed = folder / draw.choice(files)
        before = changed.read_bytes()
        damage(changed, draw)
        if changed.read_bytes() != before:
            attempt(lambda: check_run(base, stopped, folder, changed), f"{changed.name}, seed {seed}")  # noqa: B023
        shutil.rmtree(folder)


def check_run(base: Settings, stopped: Path, folder: Path, changed: Path) -> None:
    """Check that a damaged checkpoint or start is left out; other damaged files raise or count as missing."""
    identity = json.loads((stopped / "checkpoints" / "run.json").read_text())
    run = RunFolder(replace(base, output=str(folder)), identity)
    state = run.look()
    place = folder / "checkpoints" / changed.relative_to(folder / "checkpoints").parts[0]
    if place.name.startswith("checkpoint-") and state.checkpoint == str(place):
        assert changed.name == run_folder.MARK, "a damaged checkpoint is used"
    if place.name == "start":
        assert str(place) in state.left_out or run.load_start() is None or changed.name == "start.json"
    read_record(Evaluation, run.before)
    run.load_start()


@counts
def test_results(whole: Path, tmp_path: Path, count: int) -> None:
    files = ("summary.json", "answers.json", "report.json")
    for seed in range(count):
        draw, folder = random.Random(f"results {seed}"), tmp_path / str(seed)
        folder.mkdir()
        for name in files:
            shutil.copy(whole / name, folder)
        damage(folder / draw.choice(files), draw)
        attempt(lambda: results.load(folder), f"results, seed {seed}")  # noqa: B023
        shutil.rmtree(folder)


ROWS = [
    {"prompt": "one two", "completion": "two one"},
    {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]},
    {"prompt": "a", "completion": "b", "user": "ann"},
]
TEXTS = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
    "labels.jsonl": "\n".join(json.dumps({"text": f"t{i}", "label": i % 2 + 0.5}) for i in range(4)),
    "alpaca.json": json.dumps([{"instruction": "say", "input": "x", "output": "y"}] * 2, indent=1),
    "run.yaml": "model: smollm2-135m\nlr: 2e-3\nr: 8\nrank_pattern:\n  q_proj: 4\npacking: false\ndata: rows.jsonl\n",
}


@pytest.mark.parametrize("name", TEXTS)
@counts
def test_texts(tmp_path: Path, name: str, count: int) -> None:
    """An error names the file."""
    file = tmp_path / name
    for seed in range(count):
        draw = random.Random(f"{name} {seed}")
        data = TEXTS[name].encode()
        if name != "run.yaml" and draw.random() < 0.5:
            lines = [json.loads(TEXTS[name])] if name.endswith(".json") else list(map(json.loads, data.splitlines()))
            at = draw.randrange(len(lines))
            lines[at] = damaged_json(lines[at], draw)
            data = "\n".join(map(json.dumps, lines)).encode("utf-8", "surrogatepass")
        else:
            data = damaged_bytes(data, draw)
        file.write_bytes(data)

        def call() -> None:
            if name == "run.yaml":
                Settings(**read_config(file)).check()
            else:
                examples = read_data(str(file), "exact")
                json.dumps([example.prompt for example in examples], ensure_ascii=False).encode()

        attempt(call, f"{name}, seed {seed}", name)
