"""Adapters: target layers, R's start, the learning rate; many Rs on one A and B, and runs that train them."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import tolerances
import torch
import transformers
from basis_models import out
from command import call
from finetune_runs import At, add, assert_same, die, killed, on_two_processes, stop_after, summary
from models import logits
from safetensors.torch import load_file, save_file
from tiny_run import WORDS, write_rows

import lorasb
from lorasb.app import adapter, finetune, train
from lorasb.app.adapter import fit_basis, make_basis, read_card
from lorasb.app.data import Example, load_examples
from lorasb.app.finetune import run_finetune
from lorasb.app.prepare import Run, prepare, save_adapter
from lorasb.app.settings import Settings
from lorasb.app.tables import basis_line, card_table
from lorasb.layers.lookup import layers_with

pytestmark = pytest.mark.usefixtures("blank_pictures")

FACTORS, WEIGHTS = "lorasb_factors.safetensors", "adapter_model.safetensors"


def test_a_list_a_pattern_or_all_linear_layers() -> None:
    pattern = r".*layers\.[01]\..*proj"
    assert [adapter.targets(said) for said in (None, "all-linear", pattern)] == ["all-linear", "all-linear", pattern]
    assert adapter.targets("q_proj, v_proj") == ["q_proj", "v_proj"]


def test_an_adapter_is_the_same_bytes_whatever_the_order_of_its_sets(tmp_path: Path) -> None:
    """The order of a set can differ between processes."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "fedcba"})
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(model)))
    assert isinstance(adapted.peft_config["default"].target_modules, set)
    run: Any = SimpleNamespace(model=adapted, adapters=[], settings=SimpleNamespace(basis=None))
    save_adapter(run, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == list("abcdef")


@pytest.mark.parametrize(
    ("given", "start", "lr"),
    [
        ({}, 4.0, 5e-3 / 2),
        ({"start": "paper"}, None, 5e-3 / 2),
        ({"start": "zero"}, 0.0, 5e-3 / 2),
        ({"eta": 1e-4}, 4.0, 1e-4),
        ({"start": "paper", "eta": 1e-4}, None, 1e-4),
        ({"rl": "exact", "rl_start": "zero", "batch_size": 16, "generations": 4}, 0.0, 5e-3 / 2),
        ({"rl": "exact", "batch_size": 16, "generations": 4}, 4.0, 5e-3 / 2),
    ],
)
def test_the_start_and_its_rate_are_those_that_were_asked_for(
    base: Settings, given: dict[str, Any], start: float | None, lr: float
) -> None:
    run = prepare(replace(base, **given))
    assert run.warmup_steps == 2
    adapter.adapt(run)
    facts = run.model.peft_config["default"].init_provenance
    assert facts["longest_start"] == start
    assert facts["lr"] == pytest.approx(lr)
    norms = [float(layer.lorasb_R["default"].detach().norm()) for layer in layers_with(run.model, "default").values()]
    assert (max(norms) == 0.0) == (start == 0.0)


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 110), (0.07, 7), (2.2, 220), (0.071, 8)])
def test_a_share_of_an_epoch_has_no_step_too_many(epochs: float, steps: int) -> None:
    run = SimpleNamespace(_steps_per_epoch=100, epochs=epochs)
    assert Run.steps.fget(run) == steps


@pytest.mark.parametrize("method", ["lora-sb", "lora"])
def test_a_run_trains_at_the_rate_that_it_found(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_resume: Any, method: str
) -> None:
    search = Mock(wraps=finetune.find_rate)
    monkeypatch.setattr(finetune, "find_rate", search)
    settings = replace(base, method=method, lr=1e-3, find_lr=True, epochs=1.0)
    found = check_resume(settings, 4)
    assert search.call_count == 2  # once per run: the stopped run saved its rate with its start
    assert found["lr"] > 1e-3  # which is far too low for this task
    assert found["config"]["lr"] == 1e-3  # so that config.yaml reproduces the run
    # R's start is scaled with the rate: a run that is given this rate has the same start
    told = run_finetune(replace(settings, lr=found["lr"], find_lr=False, output=str(tmp_path / "told"))).summary
    assert found["train_losses"] == pytest.approx(told["train_losses"], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_trials_take_the_runs_own_batches(base: Settings, packing: bool) -> None:
    run = prepare(replace(base, packing=packing, max_length=16, gradient_accumulation=2))
    run.model = lorasb.patch(run.model, r=4)
    found = list(train.batches(run))
    assert max(len(batch["input_ids"]) for batch in found) == base.batch_size // 2
    assert ("attention_mask" not in found[0]) == packing  # packed examples are separated by their positions


@pytest.mark.parametrize("count", [16, 6, 3])
@pytest.mark.parametrize("find_lr", [False, True])
def test_no_row_is_trained_on_and_judges(
    base: Settings, monkeypatch: pytest.MonkeyPatch, count: int, find_lr: bool
) -> None:
    """This holds for a single batch, too: its rows are split in half."""
    run = prepare(replace(base, find_lr=find_lr))
    run.rows, seen = run.rows[:count], Mock(return_value=SimpleNamespace(lr=1.0, steps=4))
    monkeypatch.setattr(train, "find_lr" if find_lr else "refine_rate", seen)
    train.find_rate(run)
    given = list(itertools.islice(seen.call_args.args[1], 20))
    judging, trained = (
        {tuple(row.tolist()) for one in part for row in rows_in(one)} for part in (given[:4], given[4:])
    )
    assert judging
    assert trained
    assert judging.isdisjoint(trained)


def rows_in(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A batch's rows without their padding."""
    return [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_trials_take_a_processs_part_of_every_step(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(base)
    monkeypatch.setattr(train, "Processes", lambda: SimpleNamespace(rank=0, world_size=1))
    whole = next(train.batches(run))["input_ids"]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "Processes", lambda rank=rank: SimpleNamespace(rank=rank, world_size=2))
        parts.append(next(train.batches(run))["input_ids"])
    assert [len(part) for part in parts] == [len(whole) // 2] * 2
    assert sum(int(part.sum()) for part in parts) == int(whole.sum())  # padding adds 0


def task(prompt: str, first: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt} {WORDS[i % 8]} {i}", "completion": WORDS[(i + first) % 8]} for i in range(24)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {
        name: write_rows(folder / f"{name}.jsonl", task(name, i)) for i, name in enumerate(("copy", "next", "mine"))
    }


@pytest.fixture(scope="session")
def settings(base: Settings) -> Settings:
    """Settings of a basis."""
    return Settings(model=base.model, dtype="float32", r=8, samples=8, lr=None)


@pytest.fixture(scope="session")
def made(settings: Settings, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of two tasks."""
    folder = tmp_path_factory.mktemp("made") / "basis"
    make_basis(replace(settings, output=str(folder)), [files["copy"], files["next"]])
    return folder


@pytest.fixture(scope="session")
def on_it(base: Settings, made: Path, files: dict[str, str]) -> Settings:
    """Settings of a run on the basis."""
    return replace(base, basis=str(made), r=None, data=files["mine"])


@pytest.fixture(scope="session")
def whole(on_it: Settings, made: Path) -> Path:
    """The folder of an uninterrupted run, next to the basis."""
    folder = made.parent / "run"
    run_finetune(replace(on_it, output=str(folder)))
    return folder


def test_the_card_says_what_the_basis_is(made: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(made.parent))
    card = read_card(f"~/{made.name}")
    assert (card.model, card.r, card.update) == (settings.model, 8, "adamw")
    assert {name: found["examples"] for name, found in card.tasks.items()} == {"copy": 24, "next": 24}
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
    assert found["adapter_bytes"] == sum((adapter / name).stat().st_size for name in (WEIGHTS, FACTORS))


def loaded(tiny: Path, folder: Path) -> Any:
    """Load a saved adapter into a new model."""
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), folder).eval()


def test_interrupted_runs_end_in_the_same_bits(on_it: Settings, whole: Path, tmp_path: Path) -> None:
    own = replace(on_it, output=str(tmp_path))
    killed(own, lambda patch: patch.setattr("lorasb.app.finetune.train", lambda *given: die()))  # its start is saved
    stop_after(4, own, tmp_path)
    run_finetune(own)
    assert_same(tmp_path, whole)


def test_people_share_a_basis_that_was_there_before(on_it: Settings, made: Path, tiny: Path, tmp_path: Path) -> None:
    rows = [row | {"user": name} for name in ("ada", "emmy") for row in task(name, 1)]
    data = write_rows(tmp_path / "users.jsonl", rows)
    run = replace(on_it, lr=None, data=data, adapter_column="user", output=str(tmp_path / "run"))
    assert 0 < run_finetune(run).summary["lr"] != 2e-3  # measured on the basis
    adapter = tmp_path / "run" / "adapter"
    own = load_file(adapter / "ada" / WEIGHTS)
    assert not any("lorasb_A" in key for key in own)
    served = loaded(tiny, made)
    assert sorted(lorasb.AdapterBank(served).load(adapter).loaded) == ["ada", "emmy"]
    assert torch.isfinite(logits(loaded(tiny, adapter / "ada"))).all()


def test_fit_by_commands(made: Path, files: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    folder, data = str(tmp_path / "one"), (files["copy"], files["next"])
    assert "copy" in call("basis", "make", settings.model, "--data", *data, "--r", "8", "--output", folder)
    assert read_card(folder).tasks.keys() == {"copy", "next"}
    fits = (call("basis", "fit", folder, "--data", files[name]) for name in ("copy", "mine"))
    own, other = (float(printed.split("The basis keeps ")[1].split("%")[0]) for printed in fits)
    assert own > other


def test_a_share_near_chance_is_a_warning() -> None:
    assert "little more than chance" in basis_line(0.02, 0.01)
    assert "little more than chance" not in basis_line(0.04, 0.01)
    assert "little more than chance" not in basis_line(0.9, 0.4)


def test_one_task_makes_a_basis_that_keeps_it(settings: Settings, files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()  # of a call that was killed
    card = make_basis(replace(settings, output=str(tmp_path)), [files["copy"]])
    assert card.tasks == {"copy": {"examples": 24, "kept": 1.0}}


def test_a_trained_lora_makes_a_basis(
    on_it: Settings, settings: Settings, files: dict[str, str], tmp_path: Path
) -> None:
    """A basis of one LoRA holds its full update: its projection gives the LoRA's logits. Two can share a basis."""
    for name in ("copy", "next"):
        options = {"method": "lora", "basis": None, "r": 4, "data": files[name], "epochs": 1.0}
        run_finetune(replace(on_it, output=str(tmp_path / name), **options))
    loras = [str(tmp_path / name / "adapter") for name in ("copy", "next")]
    card = make_basis(replace(settings, r=None, output=str(tmp_path / "one")), [], loras[:1])
    assert (card.r, card.tasks["copy"]["kept"]) == (4, pytest.approx(1.0, abs=1e-4))
    base = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "one").eval()
    assert lorasb.project(model, loras[0], "mine") < 1e-4
    model.set_adapter("mine")
    found = logits(model)
    tolerances.check(found, logits(peft.PeftModel.from_pretrained(model.unload(), loras[0]).eval()), tolerances.EXPORT)
    card = make_basis(replace(settings, r=4, output=str(tmp_path / "both")), [], loras)
    assert all(0.1 < one["kept"] < 1.0 for one in card.tasks.values())
    assert card_table(card).columns[1].header == "kept of its update"
    on_both = replace(on_it, basis=str(tmp_path / "both"), output=str(tmp_path / "run"))
    assert run_finetune(replace(on_both, epochs=0.5)).summary["basis_fit"] is None
    with pytest.raises(ValueError, match="was made of LoRAs, whose directions hold little of any first step"):
        fit_basis(on_both)
    for data, given in (([], []), ([files["copy"]], loras)):
        with pytest.raises(ValueError, match=r"expected --data FILES, .*, or --lora FOLDERS, whose updates do"):
            make_basis(replace(settings, output=str(tmp_path / "no")), data, given)


def test_another_basis_is_refused(on_it: Settings, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    card, file = json.loads((copy / "basis.json").read_text()), copy / FACTORS
    damaged = {key: value + 1 for key, value in load_file(file).items()}
    for change, message in (
        ({"digest": "00"}, r"has other A and B than its basis\.json says"),
        ({"color": "red"}, "is no card of a basis"),
        ({}, "is damaged: its A and B are not what"),
    ):
        (copy / "basis.json").write_text(json.dumps(card | change))
        if not change:
            save_file(damaged, file, metadata={"format": "pt", "digest": card["digest"]})
        with pytest.raises(ValueError, match=message):
            run_finetune(replace(on_it, basis=str(copy), output=str(tmp_path / "run")))


def test_a_basis_belongs_to_weights_and_not_to_a_folder(
    on_it: Settings, made: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """The model may have moved; other weights, or quantized ones under another name, are refused before evaluation."""
    moved = Path(shutil.copytree(on_it.model, tmp_path / "moved"))
    assert "The basis keeps" in call("basis", "fit", str(made), "--data", files["mine"], "--model", str(moved))
    run_finetune(replace(on_it, model=str(moved), epochs=1.0, output=str(tmp_path / "moved-run")))
    with pytest.raises(ValueError, match=f"if the model of {made} was moved, pass its new folder"):
        replace(on_it, model=str(tmp_path / "gone")).check()
    quantized = replace(on_it, model=str(moved), bits=4, output=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"which is another model \(its weights cannot be compared, .*\): pass the model that"
    ):
        run_finetune(quantized)
    weights = load_file(moved / "model.safetensors")
    changed = {name: value * 1.5 if "q_proj" in name else value for name, value in weights.items()}
    save_file(changed, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"which is another model \(.* of 16 sampled weights of .*q_proj' differ\)"):
        run_finetune(replace(on_it, model=str(moved), output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_basis_has_its_dtype_and_its_digest(on_it: Settings, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has A and B in float32, got --dtype bfloat16: leave --dtype out"):
        run_finetune(replace(on_it, dtype="bfloat16", output=str(tmp_path / "run")))
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    own = replace(on_it, basis=str(copy), dtype="auto", output=str(tmp_path / "run"))
    assert run_finetune(own).summary["dtype"] == "float32"
    shutil.rmtree(copy)
    make_basis(replace(on_it, basis=None, r=8, seed=1, output=str(copy)), [str(on_it.data)])
    with pytest.raises(ValueError, match="A and B of the basis have changed"):
        run_finetune(own)


def test_labeled_rows_are_refused_on_a_basis(on_it: Settings, made: Path, tmp_path: Path) -> None:
    labeled = write_rows(tmp_path / "labels.jsonl", ({"text": f"red {i}", "label": i % 2} for i in range(20)))
    for run in (
        lambda: run_finetune(replace(on_it, data=labeled, output=str(tmp_path / "run"))),
        lambda: fit_basis(replace(on_it, data=labeled)),
        lambda: make_basis(replace(on_it, basis=None, output=str(tmp_path / "basis")), [labeled]),
        lambda: make_basis(replace(on_it, basis=None, output=str(tmp_path / "basis")), [str(on_it.data), labeled]),
    ):
        with pytest.raises(ValueError, match=r"labels\.jsonl: expected rows .* got labeled ones: a basis has no head"):
            run()
    assert not (tmp_path / "basis" / "basis.json").exists()


def test_a_basis_is_made_into_a_new_folder_alone(
    settings: Settings, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the user's is deleted, no basis that adapters depend on is replaced, nor a shell's own folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == empty)
        with pytest.raises(ValueError, match=r"got .*empty, which is a mount point or .*: take .*empty/basis"):
            make_basis(replace(settings, output=str(empty)), [files["copy"]])
    monkeypatch.chdir(empty)
    with pytest.raises(ValueError, match=r"got \., which is .* has the current folder: take \./basis"):
        make_basis(replace(settings, output="."), [files["copy"]])
    kept = tmp_path / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="expected --output to be a new folder"):
        make_basis(replace(settings, output=str(tmp_path)), [files["copy"]])
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Ada", "has rows of adapter 'Ada', and --data has none of it: did you mean 'ada'"),
        ("ada", "has every prompt of --data of adapter 'ada': name rows that are not to be"),
    ],
)
def test_people_without_a_row_to_train_on_are_refused(on_it: Settings, tmp_path: Path, name: str, message: str) -> None:
    rows = [row | {"user": user} for user in ("ada", "emmy") for row in task("copy", 1)]
    held_out = write_rows(tmp_path / "held-out.jsonl", [row | {"user": name} for row in task("copy", 1)])
    data = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_examples(replace(on_it, data=data, eval_data=held_out, adapter_column="user"))


LORA_CHANGES: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], str]] = {
    "untrained": (lambda key, value: {key: value * ("lora_B" not in key)}, "expected trained LoRAs, and the update of .* is zero"),
    "not finite": (lambda key, value: {key: value / 0}, r"expected finite values in .*, got NaN or Inf in model\.layers"),
    "of more layers": (
        lambda key, value: {key: value, key.replace("layers.0.", "layers.9."): value.clone()},
        r"has an update of layer 'model\.layers\.9\..*', which this model lacks: it is for another one",
    ),
    "wider": (
        lambda key, value: {key: torch.cat((value, value), int("lora_A" in key))},
        r"has an update \[128, 128\] of layer .*, which is \[64, 64\]: it belongs to another base model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", LORA_CHANGES)
def test_loras_that_make_no_basis(settings: Settings, tmp_path: Path, change: str) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(settings.model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    file, (edit, message) = tmp_path / "lora" / WEIGHTS, LORA_CHANGES[change]
    save_file({k: v for key, value in load_file(file).items() for k, v in edit(key, value).items()}, file)
    with pytest.raises(ValueError, match=message):
        make_basis(replace(settings, r=None, output=str(tmp_path / "basis")), [], [str(tmp_path / "lora")])


def test_files_that_make_no_basis(settings: Settings, files: dict[str, str], tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "basis"))
    same = write_rows(tmp_path / "other" / "copy.jsonl", task("copy", 1))
    for given, message in (
        ([files["copy"], same], "for each task, each with a different name, got two named 'copy'"),
        ([files["copy"], "nowhere"], "expected a JSONL file, found none at nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            make_basis(own, given)
    assert not (tmp_path / "basis" / "basis.json").exists()


NAMES = ["ada", "emmy", "grace"]


@pytest.fixture(scope="session")
def several(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a run over three people, who answer the same prompts, each with a different word."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {"prompt": f"copy {WORDS[i]} {i % 7}", "completion": WORDS[NAMES.index(name)], "user": name}
        for i in range(10)
        for name in NAMES
    ]
    return replace(base, data=write_rows(folder / "data.jsonl", rows), adapter_column="user")


@pytest.fixture(scope="session")
def done(several: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run over three people."""
    folder = tmp_path_factory.mktemp("done")
    run_finetune(replace(several, output=str(folder)))
    return folder


@pytest.mark.parametrize(("batch_size", "column", "passes"), [(2, "user", 7), (2, None, 5), (27, "user", 20)])
def test_passes_give_every_adapter_enough_steps(
    several: Settings, batch_size: int, column: str | None, passes: int
) -> None:
    """27 training rows, nine per adapter: each is in about nine of 14 steps of two rows; a batch of all is one step."""
    settings = replace(several, epochs=None, batch_size=batch_size, adapter_column=column, eval_examples=3)
    assert prepare(settings).epochs == passes


@pytest.mark.parametrize(
    ("count", "given", "found"),
    [
        (8, {}, (2, 15.0, 60)),
        (1, {}, (1, 20.0, 20)),
        (47, {}, (15, 15.0, 60)),
        (48, {}, (16, 20.0, 60)),
        (8, {"epochs": 2.0}, (16, 2.0, 2)),
        (8, {"batch_size": 4}, (4, 20.0, 40)),
        (8, {"gradient_accumulation": 2}, (16, 20.0, 20)),
    ],
)
def test_a_few_examples_make_enough_steps(
    base: Settings, count: int, given: dict[str, Any], found: tuple[int, float, int], tmp_path: Path
) -> None:
    rows = [{"prompt": f"copy red {i}", "completion": "red"} for i in range(count)]
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "copy two", "completion": "two"}])
    data = write_rows(tmp_path / "data.jsonl", rows)
    fields = {"batch_size": None, "epochs": None, "data": data, "eval_data": held_out} | given
    run = prepare(replace(base, **fields))
    assert (run.batch_size, run.epochs, run.steps) == found


def test_each_learns_its_own_answers(several: Settings, tiny: Path, tmp_path: Path) -> None:
    sure = shutil.copytree(tiny, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.get_input_embeddings().weight.data *= 20  # otherwise no answer could get a large logit
    model.save_pretrained(sure)
    held_out = [
        {"prompt": f"copy {word} 6", "completion": WORDS[i], "user": name}
        for i, name in enumerate(NAMES)
        for word in WORDS[:4]
    ]
    file = write_rows(tmp_path / "held_out.jsonl", held_out)
    settings = replace(several, model=str(sure), eval_data=file, epochs=10.0, lr=4e-2, batch_size=6)
    result = run_finetune(replace(settings, output=str(tmp_path / "run")))
    found = result.summary["adapters"]
    assert list(found) == NAMES
    assert [one["train_examples"] for one in found.values()] == [10, 10, 10]
    assert all(one["eval_examples"] == 4 and one["before"] == 0.0 for one in found.values())
    assert all(one["after"] >= 0.5 for one in found.values())  # a shared adapter could be right for only one of them
    assert result.summary["train_losses"][-1] < 0.01
    assert result.summary["trainable_params"] == len(NAMES) * 14 * 8**2  # seven layers in each of two blocks


def test_somebody_is_added_later(
    several: Settings, done: Path, files: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    """The run's folder is a basis: an adapter trained on it starts as the others did and changes none of its bytes."""
    before = {path: path.read_bytes() for path in (done / "adapter").rglob("*") if path.is_file()}
    card = read_card(done / "adapter")
    assert (card.r, card.tasks["data"]["examples"], card.dtype) == (8, 27, "float32")
    later = replace(several, r=None, data=files["mine"], adapter_column=None, basis=str(done / "adapter"))
    run_finetune(replace(later, output=str(tmp_path / "later")))
    bank = lorasb.AdapterBank(served := loaded(tiny, done / "adapter"))
    assert bank.load(done / "adapter", later=tmp_path / "later" / "adapter").loaded == [*NAMES, "later"]
    alone = loaded(tiny, tmp_path / "later" / "adapter")
    assert torch.allclose(out(served, "later", "later"), logits(alone), atol=1e-6)
    assert len({out(served, name, name).sum().item() for name in (*NAMES, "later")}) == len(NAMES) + 1
    assert not (done / "lora").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert f"lorasb finetune --basis {done}/adapter --data NEW.jsonl" in call(
        "finetune", "--config", f"{done}/config.yaml"
    )
    with pytest.raises(ValueError, match=r"found no basis\.json in .* \(did you mean .*adapter\?\)"):
        run_finetune(replace(later, basis=str(done), output=str(tmp_path / "no")))


def test_rows_that_teach_an_adapter_little_are_named(several: Settings) -> None:
    rows = [Example("Where?", "Oslo", adapter="ada"), Example("Where?", "Lima", adapter="ada")]
    rows += [Example("Where?", "Rome", adapter=name) for name in ("b", "c", "d", "e")]
    said = list(train.remarks(SimpleNamespace(train=rows, adapters=["ada", "b", "c", "d", "e"])))
    assert said[0] == "4 of 5 adapters have one example to train on: b, c, d, ..."
    assert said[1] == "adapter 'ada' has different answers to 'Where?': if they are of two people, give each a name"
    texts = [Example("", text, adapter="ada") for text in ("one", "two")]
    assert not list(train.remarks(SimpleNamespace(train=texts, adapters=["ada"])))
    assert not list(train.remarks(SimpleNamespace(train=rows, adapters=[])))


def test_kill_9_and_interrupts_end_in_the_same_bits(several: Settings, done: Path, tmp_path: Path) -> None:
    settings = replace(several, output=str(tmp_path))
    killed(settings, lambda patch: add(patch, At(5, die)))
    killed(settings, lambda patch: patch.setattr("lorasb.app.results.save", lambda *given: die()))
    run_finetune(settings)
    assert_same(tmp_path, done)
    for name in NAMES:
        config = f"adapter/{name}/adapter_config.json"
        assert (tmp_path / config).read_text() == (done / config).read_text()


def test_a_person_with_one_example_trains_on_it(several: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": f"copy {word} {i}", "completion": word, "user": f"p{i}"} for i, word in enumerate(WORDS[:6])]
    rows += [{"prompt": f"copy red {i}", "completion": "red", "user": "ada"} for i in range(30)]
    train, held_out = load_examples(replace(several, data=write_rows(tmp_path / "data.jsonl", rows)))
    assert {example.adapter for example in train} == {"ada", *(f"p{i}" for i in range(6))}
    assert {example.adapter for example in held_out} == {"ada"}


@pytest.mark.parametrize(
    "user",
    [None, True, 1.5, ["ada"], "default", "update", "training", "__base__", "a.b", "a/b", "a b", "-x", "x" * 61, ""],
)
def test_what_names_no_adapter_is_refused(user: Any, several: Settings, tmp_path: Path) -> None:
    row = {"prompt": "copy red", "completion": "red", "user": user}
    file = write_rows(tmp_path / "data.jsonl", [row | {"user": "ada"}, row])
    with pytest.raises(ValueError, match="line 2: expected an adapter's name in user, of at most 60 letters"):
        load_examples(replace(several, data=file))


@pytest.mark.long
def test_two_processes_train_what_one_does(several: Settings, done: Path, tmp_path: Path) -> None:
    """In a step, some adapters have rows in only one process, and some in none."""
    given = {"--model": several.model, "--data": several.data, "--adapter-column": "user", "--output": tmp_path}
    on_two_processes(given)
    ours, alone = summary(tmp_path), summary(done)
    assert ours["identity"]["processes"] == 2
    assert ours["train_losses"] == pytest.approx(alone["train_losses"], rel=1e-2)
    assert ours["eval_loss_after"] == pytest.approx(alone["eval_loss_after"], rel=1e-2)


def test_a_layers_number_names_no_adapter(several: Settings, tmp_path: Path) -> None:
    """The name is refused before the model is evaluated."""
    rows = [{"prompt": f"copy red {i}", "completion": "red", "user": i % 2} for i in range(20)]
    with pytest.raises(ValueError, match="adapter '0' has the name of a part of the model"):
        run_finetune(replace(several, data=write_rows(tmp_path / "data.jsonl", rows), output=str(tmp_path / "run")))
    assert not list((tmp_path / "run").rglob("before.json"))
