"""`--rl`: the reward of a completion, by a generated task's verifier, by `--score`, or by a function of yours."""

from __future__ import annotations

import importlib.util
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training.reinforcement import RewardError, checked_rewards
from .examples.tasks import Example, data_set
from .problems.scoring import is_right
from .settings import Settings

SECONDS = 60.0  # that the rewards of a step may take
Judge = Callable[[Sequence[str], Sequence[Example]], list[float]]  # completions and their examples


def judge_of(settings: Settings) -> Judge:
    """How completions are judged.

    Raises:
        ValueError: `--rl` names no reward; a file or a function of it is not there.
    """
    if settings.rl == "exact":
        return _exact
    if settings.rl == "verifier":
        return _verifier(settings.generated_task)
    path, _, name = (settings.rl or "").rpartition(":")
    file = Path(path)
    if not path or file.suffix != ".py" or not file.is_file():
        raise ValueError(
            f"--rl must be verifier, exact or FILE.py:FUNCTION, got {settings.rl!r}"
            + (f", and there is no file {path}" if path else "")
        )
    return _function(file, name)


def _exact(completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """1 for a right answer, else 0."""
    pairs = zip(completions, examples, strict=True)
    return [float(is_right(text.strip(), example.completion, example.score)) for text, example in pairs]


def _verifier(task: str) -> Judge:
    """reasoning-gym's own, which gives a part of 1 for a part of the answer."""
    data = data_set(task, 1, 0)

    def verifier(prompts: Sequence[str], completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Scores of answers."""
        entries = ({"question": e.prompt, "answer": e.completion, "metadata": {}} for e in examples)
        return [data.score_answer(text.strip(), entry) for text, entry in zip(completions, entries, strict=True)]

    return _checked(verifier)


def _function(file: Path, name: str) -> Judge:
    """A function of the caller's file, `name(prompts=, completions=, answers=)`."""
    spec = importlib.util.spec_from_file_location(f"lorasb_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--rl {file}:{name}: expected a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the caller's own code
        raise ValueError(f"--rl {file}:{name}: the file cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))) or "none"
        raise ValueError(f"--rl {file}:{name}: the file has no function {name!r}; it has {known}")

    def answered(prompts: Sequence[str], completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The function, with the right answers beside the completions."""
        return list(function(prompts=prompts, completions=completions, answers=[e.completion for e in examples]))

    answered.__name__ = f"{file.name}:{name}"
    return _checked(answered)


def _checked(reward: Callable[..., Sequence[float]]) -> Judge:
    """A reward whose errors, values and time are checked."""

    def judge(completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Rewards of completions."""
        prompts = [example.prompt for example in examples]
        done: queue.Queue[Any] = queue.Queue()

        def call() -> None:
            """Put the rewards, or the error."""
            try:
                done.put(checked_rewards(reward, prompts, completions, examples=examples))
            except RewardError as error:
                done.put(error)

        # a daemon, as a reward that never returns must not keep the process alive
        threading.Thread(target=call, daemon=True).start()
        try:
            found = done.get(timeout=SECONDS)
        except queue.Empty:
            raise RewardError(
                f"reward {reward.__name__} took longer than {SECONDS:g} s for {len(completions)} completions"
            ) from None
        if isinstance(found, RewardError):
            raise found
        return list(found)

    return judge
