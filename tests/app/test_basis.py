"""`lorasb basis make` and `fit`, and `finetune --basis`: R alone is trained and saved, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from finetune_runs import assert_same, die, killed, stop_after, summary
from safetensors.torch import load_file, save_file
from tiny_run import WORDS
from typer.testing import CliRunner

import lorasb
from lorasb.app import basis
from lorasb.app.cli import app
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings

FACTORS, WEIGHTS = "lorasb_factors.safetensors", "adapter_model.safetensors"


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def task(prompt: str, first: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt} {WORDS[i % 8]} {i}", "completion": WORDS[(i + first) % 8]} for i in range(24)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {name: write(folder / f"{name}.jsonl", task(name, i)) for i, name in enumerate(("copy", "next", "mine"))}


@pytest.fixture(scope="session")
def settings(base: Settings) -> Settings:
    """Of a basis."""
    return Settings(model=base.model, dtype="float32", r=8, samples=8, lr=None)


@pytest.fixture(scope="session")
def made(settings: Settings, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of two tasks."""
    folder = tmp_path_factory.mktemp("made") / "basis"
    basis.make_basis(replace(settings, output=str(folder)), [files["copy"], files["next"]])
    return folder


@pytest.fixture(scope="session")
def on_it(base: Settings, made: Path, files: dict[str, str]) -> Settings:
    """Of a run on the basis."""
    return replace(base, basis=str(made), r=None, data=files["mine"])


@pytest.fixture(scope="session")
def whole(on_it: Settings, made: Path) -> Path:
    """The folder of a run that nobody disturbed, next to the basis."""
    folder = made.parent / "run"
    run_finetune(replace(on_it, output=str(folder)))
    return folder


def test_the_card_says_what_the_basis_is(made: Path, settings: Settings) -> None:
    card = basis.read_card(made)
    assert (card.model, card.r, card.update) == (settings.model, 8, "adamw")
    assert {name: found["examples"] for name, found in card.tasks.items()} == {"copy": 23, "next": 23}
    assert all(0.5 < found["kept"] <= 1 for found in card.tasks.values())
    cores = load_file(made / WEIGHTS)
    assert not any(value.any() for key, value in cores.items() if "lorasb_R" in key)
    assert not any("lorasb_A" in key or "lorasb_B" in key for key in cores)


def test_a_run_trains_and_saves_r_alone(made: Path, whole: Path) -> None:
    adapter = whole / "adapter"
    assert (adapter / FACTORS).samefile(made / FACTORS)  # no second copy
    assert (adapter / WEIGHTS).stat().st_size < (made / FACTORS).stat().st_size
    assert not (whole / "lora").exists()
    found = summary(whole)
    assert found["train_losses"][-1] < found["train_losses"][0]
    assert 0 < found["basis_fit"]["random"] < found["basis_fit"]["share"] < 1
    assert found["adapter_bytes"] == (adapter / WEIGHTS).stat().st_size


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(3, 9)[None], **options).logits
    return result


def test_what_it_saves_loads_alone_and_into_a_bank(made: Path, whole: Path, tiny: Path) -> None:
    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tiny)

    alone = peft.PeftModel.from_pretrained(fresh(), whole / "adapter")
    served = peft.PeftModel.from_pretrained(fresh(), made)
    assert not torch.equal(logits(alone), logits(served))
    bank = lorasb.AdapterBank(served)
    assert bank.load(whole / "adapter", ada=whole / "adapter").loaded == ["adapter", "ada"]
    for name in ("adapter", "ada"):
        assert torch.allclose(logits(served, adapter_names=[name]), logits(alone), atol=1e-6)
    assert "nowhere" in bank.load(emmy=made / "nowhere").failed["emmy"]


def test_interrupted_runs_end_in_the_same_bits(on_it: Settings, whole: Path, tmp_path: Path) -> None:
    own = replace(on_it, output=str(tmp_path))
    killed(own, lambda patch: patch.setattr("lorasb.app.finetune.train", lambda *given: die()))  # with the start saved
    stop_after(4, own, tmp_path)
    run_finetune(own)
    assert_same(tmp_path, whole)


def test_people_share_a_basis_that_was_there_before(on_it: Settings, made: Path, tiny: Path, tmp_path: Path) -> None:
    rows = [row | {"user": name} for name in ("ada", "emmy") for row in task(name, 1)]
    data = write(tmp_path / "users.jsonl", rows)
    run_finetune(replace(on_it, data=data, adapter_column="user", output=str(tmp_path / "run")))
    adapter = tmp_path / "run" / "adapter"
    own = load_file(adapter / "ada" / WEIGHTS)
    assert not any("lorasb_A" in key for key in own)
    served = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), made)
    assert sorted(lorasb.AdapterBank(served).load(adapter).loaded) == ["ada", "emmy"]
    alone = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), adapter / "ada")
    assert torch.isfinite(logits(alone)).all()


def test_a_rate_is_measured_on_the_basis(on_it: Settings, tmp_path: Path) -> None:
    found = run_finetune(replace(on_it, lr=None, output=str(tmp_path))).summary
    assert 0 < found["lr"] != 2e-3


def test_fit_by_commands(made: Path, files: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    runner, folder = CliRunner(), str(tmp_path / "one")
    done = runner.invoke(
        app,
        ["basis", "make", settings.model, "--data", files["copy"], files["next"], "--r", "8", "--output", folder],
    )
    assert done.exit_code == 0, done.output
    assert "copy" in done.output
    assert basis.read_card(folder).tasks.keys() == {"copy", "next"}
    own = runner.invoke(app, ["basis", "fit", folder, "--data", files["copy"]])
    other = runner.invoke(app, ["basis", "fit", folder, "--data", files["mine"]])
    assert own.exit_code == other.exit_code == 0, own.output + other.output
    assert "The basis keeps" in own.output
    shares = [float(done.output.split("The basis keeps ")[1].split("%")[0]) for done in (own, other)]
    assert shares[0] > shares[1]


def test_one_task_makes_a_basis_that_keeps_it(settings: Settings, files: dict[str, str], tmp_path: Path) -> None:
    card = basis.make_basis(replace(settings, output=str(tmp_path / "one")), [files["copy"]])
    assert card.tasks == {"copy": {"examples": 23, "kept": 1.0}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "has layers, ranks, A and B, and R starts at 0, got --r 4: leave it out"),
        ({"method": "lora"}, "got --method lora"),
        ({"target_modules": "q_proj"}, "got --target-modules q_proj"),
        ({"update": "sgd"}, "got --update sgd"),
        ({"start": "paper"}, "got --start paper"),
        ({"basis": "nowhere"}, "expected the folder of a basis .*, found no basis.json in nowhere"),
    ],
)
def test_what_a_basis_has_decided_is_refused(
    on_it: Settings, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(on_it, output=str(tmp_path), **options))


def test_another_model_or_basis_is_refused(on_it: Settings, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    card = json.loads((copy / "basis.json").read_text())
    (copy / "basis.json").write_text(json.dumps(card | {"model": "another"}))
    with pytest.raises(ValueError, match="was made on --model another, got"):
        run_finetune(replace(on_it, basis=str(copy), output=str(tmp_path / "run")))
    (copy / "basis.json").write_text(json.dumps(card | {"digest": "00"}))
    with pytest.raises(ValueError, match=r"has other A and B than its basis\.json says"):
        run_finetune(replace(on_it, basis=str(copy), output=str(tmp_path / "run")))
    (copy / "basis.json").write_text(json.dumps(card | {"color": "red"}))
    with pytest.raises(ValueError, match="is no card of a basis"):
        basis.read_card(copy)
    (copy / "basis.json").write_text(json.dumps(card))
    factors = load_file(copy / FACTORS)
    with_digest = {"format": "pt", "digest": card["digest"]}
    save_file({key: value + 1 for key, value in factors.items()}, copy / FACTORS, metadata=with_digest)
    with pytest.raises(ValueError, match="is damaged: its A and B are not what"):
        run_finetune(replace(on_it, basis=str(copy), output=str(tmp_path / "run")))


def test_files_that_make_no_basis(settings: Settings, files: dict[str, str], tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "basis"))
    (tmp_path / "other").mkdir()
    same = write(tmp_path / "other" / "copy.jsonl", task("copy", 1))
    with pytest.raises(ValueError, match="each with another name, got two named 'copy'"):
        basis.make_basis(own, [files["copy"], same])
    with pytest.raises(ValueError, match="got none"):
        basis.make_basis(own, [])
    labeled = write(tmp_path / "labels.jsonl", [{"text": f"red {i}", "label": i % 2} for i in range(20)])
    with pytest.raises(ValueError, match="got labeled examples: a basis has no head"):
        basis.make_basis(own, [labeled])
    with pytest.raises(ValueError, match="expected a JSONL file, found none at nowhere"):
        basis.make_basis(own, [files["copy"], "nowhere"])
    assert not (tmp_path / "basis" / "basis.json").exists()
