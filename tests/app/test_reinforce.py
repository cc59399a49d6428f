"""`lorasb finetune --rl`: GRPO with a reward; checkpoints and results as in any run; bad rewards get one line."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from lorasb.app import reinforce
from lorasb.app.data import QUESTION_ONLY, Example, generate
from lorasb.app.finetune import run_finetune
from lorasb.app.reinforce import judge_of
from lorasb.app.settings import TASKS, Settings
from lorasb.training.reinforcement import RewardError

LETTERS = """
from __future__ import annotations

import dataclasses
import time

constant, calls = 3, 0


def letters(prompts, completions, answers):
    assert len(prompts) == len(completions) == len(answers)
    return [len(text) for text in completions]


def late(**given):
    time.sleep(0.5)


def fails(completions, **given):
    global calls
    calls += 1
    return [1 / (4 - calls)] * len(completions)


@dataclasses.dataclass
class Answer:
    text: str
"""
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # about TRL's casts and pinned memory
    pytest.mark.usefixtures("blank_pictures"),
]


@pytest.fixture
def reinforced(base: Settings, tmp_path: Path) -> Settings:
    (tmp_path / "letters.py").write_text(LETTERS)
    options = {"batch_size": 8, "generations": 4, "max_new_tokens": 5, "eval_examples": 2, "epochs": 0.4}
    return replace(base, rl=f"{tmp_path / 'letters.py'}:letters", output=str(tmp_path / "run"), **options)


@pytest.mark.parametrize(("start", "recomputed"), [("rewards", True), ("lora", False)])
def test_a_run_by_rewards_writes_what_any_run_does(
    reinforced: Settings, start: str, recomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are recomputed only if the settings say so, although TRL's own arguments always do."""
    calls: list[PreTrainedModel] = []
    enable = PreTrainedModel.gradient_checkpointing_enable
    watched = lambda model, *args, **kwargs: calls.append(model) or enable(model, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", watched)
    kind: dict[str, Any] = {"method": "lora", "r": 1} if start == "lora" else {"rl_start": start}
    result = run_finetune(replace(reinforced, gradient_checkpointing=recomputed, **kind))
    assert bool(calls) == recomputed
    assert len(result.summary["rewards"]) == result.summary["train_steps"] == 6
    assert all(value > 0 for value in result.summary["rewards"])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"adapter", "summary.json", "answers.json", "loss.png", "config.yaml"}
    assert "checkpoints" not in names
    assert ("lora" in names) == (result.report is not None) == (start != "lora")
    (tmp_path / "letters.py").write_text(LETTERS + "\n")
    with pytest.raises(ValueError, match=r"the contents of --rl's file, .* have changed"):
        run_finetune(replace(reinforced, gradient_checkpointing=recomputed, **kind))


def test_a_stopped_run_goes_on_to_the_same_bits(reinforced: Settings, check_resume: Any) -> None:
    check_resume(replace(reinforced, batch_size=24, epochs=1.5), 5)  # in the second epoch


def test_a_reward_that_fails_leaves_the_checkpoints(reinforced: Settings, tmp_path: Path) -> None:
    settings = replace(reinforced, rl=reinforced.rl.replace(":letters", ":fails"), save_steps="1")
    with pytest.raises(RewardError, match=r"reward letters.py:fails failed: ZeroDivisionError"):
        run_finetune(settings)
    kept = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert kept
    assert all((folder / "complete.json").is_file() for folder in kept)


def examples(*answers: str) -> list[Example]:
    return [Example("p", answer) for answer in answers]


def test_exact_and_the_verifiers_of_all_tasks_know_right_answers(base: Settings) -> None:
    assert judge_of(replace(base, rl="exact"))([" one", "two"], examples("one", "one")) == [1.0, 0.0]
    for task in TASKS:
        found = generate(task, 2, 0)
        judge = judge_of(replace(base, data=None, task=task, rl="verifier"))
        right, wrong = judge([found[0].completion, "nonsense"], found)
        assert right == 1.0
        assert wrong < 0.5
        assert task not in QUESTION_ONLY or "\n" not in found[0].prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rl": "magic"}, "--rl must be verifier, exact or FILE.py:FUNCTION, got 'magic'"),
        ({"rl": "nowhere.py:f"}, "and there is no file nowhere.py"),
        ({"rl": "verifier"}, "--rl verifier is a generated task's own"),
        ({"generations": 3}, "--batch-size 8 counts completions with --rl: take a multiple of --generations"),
        ({"method": "lora", "rl_start": "rewards"}, "--rl-start rewards requires --method lora-sb"),
        ({"packing": True}, "--packing cannot be combined with --rl"),
        ({"sampler": "http://127.0.0.1:1"}, "--sampler needs --basis"),
        ({"sampler": "http://127.0.0.1:1", "rl": None}, "--sampler samples completions for --rl"),
        ({"rl_start": "luck"}, "--rl-start must be one of examples, rewards, zero, got 'luck'"),
        ({"batch_size": 128}, r"--rl needs 32 prompts per step .*, got 28 to train on"),
    ],
)
def test_bad_settings_get_one_line(reinforced: Settings, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(reinforced, **options))


def test_bad_functions_get_one_line(reinforced: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "letters.py"

    def judge(name: str) -> Any:
        return judge_of(replace(reinforced, rl=f"{file}:{name}"))

    with pytest.raises(ValueError, match="the file has no function 'constant'; it has Answer, fails, late, letters"):
        judge("constant")
    monkeypatch.setattr(reinforce, "SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward letters.py:late took longer than 0.05 s for 1 completions"):
        judge("late")(["a"], examples("a"))
    assert time.monotonic() - started < 0.4
    file.write_text("1 +")
    with pytest.raises(ValueError, match="the file cannot be imported: SyntaxError"):
        judge("letters")


def test_without_a_rate_it_is_one_for_the_rank(base: Settings) -> None:
    """At r = 64, 2e-3 is twenty times the best rate of a sweep."""
    rates = [replace(base, rl="exact", lr=None).default_rate(r) for r in (None, 64, 8)]
    assert rates == pytest.approx([1e-4, 1e-4, 8e-4])
    assert replace(base, rl="exact", method="lora").default_rate(32) == 2.5e-4
    assert replace(base, lr=None).default_rate(8) == 2e-3
