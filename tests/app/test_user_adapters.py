"""`--adapter-column`: one run trains an adapter for each name in the data, evaluates each on its own, and goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from finetune_runs import At, add, assert_same, die, killed, on_two_processes, stop_after, summary
from tiny_run import WORDS, write_rows

import lorasb
from lorasb.app.data import load_examples
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings

NAMES = ["ada", "emmy", "grace"]


@pytest.fixture(scope="session")
def several(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Three people, each of whom answers the same prompts by a word of their own."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {"prompt": f"copy {WORDS[i]} {i % 7}", "completion": WORDS[NAMES.index(name)], "user": name}
        for i in range(10)
        for name in NAMES
    ]
    return replace(base, data=write_rows(folder / "data.jsonl", rows), adapter_column="user")


@pytest.fixture(scope="session")
def whole(several: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_finetune(replace(several, output=str(folder)))
    return folder


def test_each_learns_its_own_answers(several: Settings, tiny: Path, tmp_path: Path) -> None:
    sure = shutil.copytree(tiny, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.get_input_embeddings().weight.data *= 20  # or no answer could have a large logit
    model.save_pretrained(sure)
    held_out = [
        {"prompt": f"copy {word} 6", "completion": WORDS[i], "user": name}
        for i, name in enumerate(NAMES)
        for word in WORDS[:4]
    ]
    file = write_rows(tmp_path / "held_out.jsonl", held_out)
    settings = replace(several, model=str(sure), eval_data=file, epochs=20.0, lr=2e-2, batch_size=6)
    result = run_finetune(replace(settings, output=str(tmp_path / "run")))
    found = result.summary["adapters"]
    assert list(found) == NAMES
    assert [one["train_examples"] for one in found.values()] == [10, 10, 10]
    assert all(one["eval_examples"] == 4 and one["before"] == 0.0 for one in found.values())
    assert all(one["after"] >= 0.5 for one in found.values())  # one adapter for all would be right for one of them
    assert result.summary["train_losses"][-1] < 0.01
    assert result.summary["trainable_params"] == len(NAMES) * 14 * 8**2  # seven layers in each of two blocks


def test_a_bank_serves_the_files(several: Settings, whole: Path, tiny: Path) -> None:
    folder = whole / "adapter"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(NAMES)
    assert not (whole / "lora").exists()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    served = peft.PeftModel.from_pretrained(fresh, folder).eval()
    bank = lorasb.AdapterBank(served)
    assert sorted(bank.load(folder).loaded) == NAMES
    ids = torch.arange(3, 9).repeat(3, 1)
    with torch.no_grad():
        logits = served(input_ids=ids, adapter_names=NAMES).logits
    assert not torch.equal(logits[0], logits[1])


def test_kill_9_and_interrupts_end_in_the_same_bits(several: Settings, whole: Path, tmp_path: Path) -> None:
    settings = replace(several, output=str(tmp_path))
    killed(settings, lambda patch: patch.setattr("lorasb.init.InitReport.save", lambda *given: die()))
    killed(settings, lambda patch: add(patch, At(5, die)))
    stop_after(8, settings, tmp_path)
    killed(settings, lambda patch: patch.setattr("lorasb.app.results.save", lambda *given: die()))
    run_finetune(settings)
    assert_same(tmp_path, whole)
    for name in NAMES:
        config = f"adapter/{name}/adapter_config.json"
        assert (tmp_path / config).read_text() == (whole / config).read_text()


def test_a_person_with_one_example_trains_on_it(several: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": f"copy {word} {i}", "completion": word, "user": f"p{i}"} for i, word in enumerate(WORDS[:6])]
    rows += [{"prompt": f"copy red {i}", "completion": "red", "user": "ada"} for i in range(30)]
    train, held_out = load_examples(replace(several, data=write_rows(tmp_path / "data.jsonl", rows)))
    assert {example.adapter for example in train} == {"ada", *(f"p{i}" for i in range(6))}
    assert {example.adapter for example in held_out} == {"ada"}


@pytest.mark.parametrize("name", ["default", "__base__", "a/b", "a.b", "", "a b"])
def test_names_that_no_folder_and_parameter_can_have(several: Settings, tmp_path: Path, name: str) -> None:
    row = {"prompt": "copy red", "completion": "red", "user": name}
    file = write_rows(tmp_path / "data.jsonl", [row | {"user": "ada"}, row])
    with pytest.raises(ValueError, match=r"line 2: expected an adapter's name in user, of letters"):
        run_finetune(replace(several, data=file, output=str(tmp_path / "run")))


@pytest.mark.long
def test_two_processes_train_what_one_does(several: Settings, whole: Path, tmp_path: Path) -> None:
    """Some of a step's adapters have rows in one process alone, and some in none."""
    given = {"--model": several.model, "--data": several.data, "--adapter-column": "user", "--output": tmp_path}
    on_two_processes(given)
    ours, alone = summary(tmp_path), summary(whole)
    assert ours["identity"]["processes"] == 2
    assert ours["train_losses"] == pytest.approx(alone["train_losses"], rel=1e-2)
    assert ours["eval_loss_after"] == pytest.approx(alone["eval_loss_after"], rel=1e-2)
