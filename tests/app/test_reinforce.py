"""`lorasb finetune --rl`: GRPO by a reward, with the checkpoints and results of any run; bad rewards get one line."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import assert_same
from transformers import PreTrainedModel

from lorasb.app import reinforce, train
from lorasb.app.finetune import run_finetune
from lorasb.app.reinforce import judge_of
from lorasb.app.settings import Settings
from lorasb.app.tasks import TASKS, Example, generate
from lorasb.app.terminal import StoppedError
from lorasb.training.reinforcement import RewardError

LETTERS = """
from __future__ import annotations

import dataclasses


def letters(prompts, completions, answers):
    assert len(prompts) == len(completions) == len(answers)
    return [len(text) for text in completions]


def late(**given):
    import time

    time.sleep(0.5)


def broken(**given):
    return given["nothing"]


@dataclasses.dataclass
class Answer:
    text: str


constant = 3
"""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of what TRL casts and pins
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def reinforced(base: Settings, tmp_path: Path) -> Settings:
    (tmp_path / "letters.py").write_text(LETTERS)
    options = {"batch_size": 8, "generations": 4, "max_new_tokens": 5, "eval_examples": 2, "epochs": 0.4}
    return replace(base, rl=f"{tmp_path / 'letters.py'}:letters", output=str(tmp_path / "run"), **options)


@pytest.mark.parametrize("start", ["examples", "rewards", "zero"])
def test_a_run_by_rewards_writes_what_any_run_does(reinforced: Settings, start: str, tmp_path: Path) -> None:
    result = run_finetune(replace(reinforced, rl_start=start))
    assert result.report is not None
    assert len(result.summary["rewards"]) == result.summary["train_steps"] == 6
    assert all(value >= 0 for value in result.summary["rewards"])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"adapter", "lora", "summary.json", "answers.json", "loss.png", "config.yaml"}
    assert "checkpoints" not in names
    started = {layer.start for layer in result.report.layers}
    assert (started == {0.0}) == (start == "zero")


def test_lora_takes_rewards_too(reinforced: Settings) -> None:
    result = run_finetune(replace(reinforced, method="lora", r=1))
    assert result.report is None
    assert len(result.summary["rewards"]) == 6


@pytest.mark.parametrize("asked", [False, True])
def test_activations_are_recomputed_where_it_was_asked_for(
    reinforced: Settings, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own arguments ask for it always."""
    calls: list[str] = []
    enable = PreTrainedModel.gradient_checkpointing_enable

    def watched(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        calls.append(type(model).__name__)
        enable(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", watched)
    run_finetune(replace(reinforced, gradient_checkpointing=asked, epochs=0.1))
    assert bool(calls) == asked


def test_fewer_prompts_than_a_step_takes_are_refused(reinforced: Settings) -> None:
    with pytest.raises(ValueError, match=r"--rl takes 32 prompts a step .* and there are 28 to train on"):
        run_finetune(replace(reinforced, batch_size=128))


class InterruptedBar(train.Bar):
    """Presses Ctrl-C after the fifth step, which is in the second epoch."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_goes_on_to_the_same_bits(
    reinforced: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reinforced = replace(reinforced, batch_size=24, epochs=1.5)
    run_finetune(replace(reinforced, output=str(tmp_path / "a")))
    with monkeypatch.context() as patch:
        patch.setattr(reinforce, "Bar", InterruptedBar)
        with pytest.raises(StoppedError, match="rerun the same command to resume"):
            run_finetune(replace(reinforced, output=str(tmp_path / "b")))
    run_finetune(replace(reinforced, output=str(tmp_path / "b")))
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_reward_that_fails_leaves_the_checkpoints(reinforced: Settings, tmp_path: Path) -> None:
    file = tmp_path / "letters.py"
    file.write_text(
        LETTERS
        + "\n\ncalls = 0\n\n\ndef fails(completions, **given):\n    global calls\n    calls += 1\n    return [1 / (4 - calls)] * len(completions)\n"
    )
    settings = replace(reinforced, rl=f"{file}:fails", save_steps="1")
    with pytest.raises(RewardError, match=r"reward letters.py:fails failed: ZeroDivisionError"):
        run_finetune(settings)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert kept
    assert all((tmp_path / "run" / "checkpoints" / name / "complete.json").is_file() for name in kept)


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


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such reward": ({"rl": "magic"}, "--rl must be verifier, exact or FILE.py:FUNCTION, got 'magic'"),
    "no such file": ({"rl": "nowhere.py:f"}, "and there is no file nowhere.py"),
    "verifier of a file": ({"rl": "verifier"}, "--rl verifier is a generated task's own"),
    "generations": (
        {"generations": 3},
        "--batch-size 8 counts completions with --rl: take a multiple of --generations",
    ),
    "start of LoRA": ({"method": "lora", "rl_start": "rewards"}, "--rl-start rewards is a start of --method lora-sb"),
    "packing": ({"packing": True}, "--packing does not go with --rl"),
    "start": ({"rl_start": "luck"}, "--rl-start must be one of examples, rewards, zero, got 'luck'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings_get_one_line(reinforced: Settings, kind: str) -> None:
    options, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(reinforced, **options))


def test_bad_functions_get_one_line(reinforced: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "letters.py"

    def judge(name: str) -> Any:
        return judge_of(replace(reinforced, rl=f"{file}:{name}"))

    with pytest.raises(ValueError, match="the file has no function 'constant'; it has Answer, broken, late, letters"):
        judge("constant")
    with pytest.raises(RewardError, match=r"reward letters.py:broken failed: KeyError: 'nothing'"):
        judge("broken")(["a"], examples("a"))
    monkeypatch.setattr(reinforce, "SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward letters.py:late took longer than 0.05 s for 1 completions"):
        judge("late")(["a"], examples("a"))
    assert time.monotonic() - started < 0.4
    file.write_text("1 +")
    with pytest.raises(ValueError, match="the file cannot be imported: SyntaxError"):
        judge("letters")


def test_labels_are_refused(reinforced: Settings, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"one {i}", "label": i % 2}) for i in range(12)))
    with pytest.raises(ValueError, match="--rl trains language models by what they answer"):
        run_finetune(replace(reinforced, data=str(file), rl="exact"))
