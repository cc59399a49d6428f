"""Many people on one basis: bytes computed from shapes, the crossover with LoRA, held-out questions, and newcomers."""

import json
from pathlib import Path

import pytest
import torch
from models import make
from processes import ROOT

import lorasb
from benchmarks.common.shapes import Group
from benchmarks.research import people as compared
from benchmarks.serving import economics
from benchmarks.serving.economics import BLOCKS, Sizes
from benchmarks.serving.people import FACTS, rows, write

MEASURED = Path(economics.__file__).parents[1] / "results" / "many-adapters-cpu.json"


def test_sizes_are_those_of_adapters_that_were_saved_and_of_a_patched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, saved = json.loads(MEASURED.read_text())["costs"], Sizes("SmolLM2-135M")
    assert (saved.lora(32), saved.core(64)) == (costs["lora_bytes"], costs["adapter_bytes"])
    model = lorasb.patch(make("llama"), r=4)
    layers = [module for module in model.modules() if hasattr(module, "lorasb_R")]
    groups = tuple(Group(("linear",), layer.in_features, (layer.out_features,)) for layer in layers)
    monkeypatch.setitem(BLOCKS, "tiny", (groups, 1))
    factors = {part: [getattr(layer, f"lorasb_{part}")["default"] for layer in layers] for part in "ARB"}
    assert {one.dtype for part in factors.values() for one in part} == {torch.float32}
    count = {part: sum(4 * one.numel() for one in found) for part, found in factors.items()}
    assert Sizes("tiny").lora(4) == count["A"] + count["B"]
    assert Sizes("tiny").core(4) == count["R"]
    assert Sizes("tiny").on_basis(4, 3) == count["A"] + count["B"] + 3 * count["R"]


@pytest.mark.parametrize("model", ["SmolLM2-135M", "Mistral-7B"])
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("lora_r", [1, 8, 32])
def test_a_crossover_is_the_first_count_that_takes_less(model: str, r: int, lora_r: int) -> None:
    sizes = Sizes(model)
    at = sizes.crossover(r, lora_r)
    if at is None:
        assert sizes.core(r) >= sizes.lora(lora_r)
        return
    assert sizes.on_basis(r, at) < at * sizes.lora(lora_r)
    assert sizes.on_basis(r, at - 1) >= (at - 1) * sizes.lora(lora_r)


def test_the_command_prints_where_a_basis_begins_to_take_less(capsys: pytest.CaptureFixture[str]) -> None:
    economics.main()
    assert "Mistral-7B, a basis of rank 16 takes less than LoRA r=1: from 17 on" in capsys.readouterr().out


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_held_out_questions_are_new_and_their_answers_known(tmp_path: Path) -> None:
    write(tmp_path, 30)
    people, held_out = read(tmp_path / "people.jsonl"), read(tmp_path / "held_out.jsonl")
    assert len({row["user"] for row in people}) == 30
    assert (len(people), len(held_out)) == (30 * 2 * len(FACTS), 60)
    assert not {row["prompt"] for row in people} & {row["prompt"] for row in held_out}
    known = {(row["user"], row["completion"]) for row in people}
    assert all((row["user"], row["completion"]) in known for row in held_out)
    answers = {row["prompt"]: set() for row in people}
    for row in people:
        answers[row["prompt"]].add(row["completion"])
    assert all(len(found) > 5 for found in answers.values())  # one adapter for everybody could not know them


def test_who_comes_later_changes_nobody(tmp_path: Path) -> None:
    write(tmp_path / "few", 10)
    write(tmp_path / "more", 20)
    few, more = (read(tmp_path / name / "people.jsonl") for name in ("few", "more"))
    assert few == more[: len(few)]
    assert read(tmp_path / "few" / "newcomer.jsonl") == rows("newcomer")[0]


def test_shares_of_right_answers_are_means_over_people() -> None:
    answers = [("ada", "Oslo", " Oslo"), ("ada", "cat", "dog"), ("grace", "Lima", "Lima")]
    named = [{"adapter": user, "completion": right, "after": said} for user, right, said in answers]
    summary = compared.joined([{"answers": named[:2], "seconds": 6.0}, {"answers": named[2:], "seconds": 4.0}])
    found = compared.scored(summary, ["ada", "grace"], ["grace"])
    assert (found["right"], found["right_of_some"], found["seconds_per_person"]) == (0.75, 1.0, 5.0)
    assert (
        compared.named([{"prompt": "Where?", "completion": "Oslo", "user": "ada"}])[0]["prompt"] == "I am ada. Where?"
    )


def test_the_documentation_has_the_sizes_that_are_printed() -> None:
    page, sizes = (ROOT / "docs" / "many-adapters.md").read_text(encoding="utf-8"), Sizes("Mistral-7B")
    for count in (1, 10, 100, 1000):
        found = [*(count * sizes.lora(r) for r in (1, 32)), *(sizes.on_basis(r, count) for r in (16, 64))]
        shown = (f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}" for size in found)
        assert "|".join(("", f"{count:,}", *shown, "")) in page.splitlines()
    assert (sizes.crossover(16, 1), sizes.crossover(16, 8)) == (17, 3)
