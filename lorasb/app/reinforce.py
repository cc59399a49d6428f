"""`lorasb finetune --rl`: train with TRL's GRPOTrainer, with the checkpoints, callbacks and results of other runs."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

import lorasb

from ..compat.transformers import on_one_device
from ..init.sampling import Batch
from ..training.reinforcement import RewardError, checked_rewards
from ..training.vllm_sampler import VLLMSampler
from .data import Example, data_set
from .evaluation import token_limit
from .prepare import Run
from .run_folder import MarkedCheckpoints
from .scoring import is_right
from .settings import Settings
from .tokenize import messages_of
from .train import argument_values

SECONDS = 60.0  # time limit for the rewards of a step
REWARD_SAMPLES = 32  # prompts for initialization from rewards
Judge = Callable[[Sequence[str], Sequence[Example]], list[float]]  # completions and their examples
Prompt = str | list[dict[str, str]]  # a text, or a chat before its last answer


def judge_of(settings: Settings) -> Judge:
    """Return the function that scores completions."""
    if settings.rl == "exact":
        return _exact
    if settings.rl == "verifier":
        return _verifier(settings.generated_task)
    path, _, name = (settings.rl or "").rpartition(":")
    file = reward_file(settings)
    if file is None:
        missing = f", and there is no file {path}" if path else ""
        raise ValueError(f"--rl must be verifier, exact or FILE.py:FUNCTION, got {settings.rl!r}{missing}")
    return _function(file, name)


def reward_file(settings: Settings) -> Path | None:
    """Return the Python file with the user's reward function; None if there is none."""
    file = Path((settings.rl or "").rpartition(":")[0])
    return file if file.suffix == ".py" and file.is_file() else None


def _exact(completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """Return 1 for each right answer, else 0."""
    pairs = zip(completions, examples, strict=True)
    return [float(is_right(text.strip(), example.completion, example.score)) for text, example in pairs]


def _verifier(task: str) -> Judge:
    """Return reasoning-gym's scorer, which gives part of 1 for a partial answer."""
    data = data_set(task, 1, 0)

    def verifier(prompts: Sequence[str], completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        entries = ({"question": e.prompt, "answer": e.completion, "metadata": {}} for e in examples)
        return [data.score_answer(text.strip(), entry) for text, entry in zip(completions, entries, strict=True)]

    return _checked(verifier)


def _function(file: Path, name: str) -> Judge:
    """Load a function `name(prompts=, completions=, answers=)` from the user's file."""
    spec = importlib.util.spec_from_file_location(f"lorasb_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--rl {file}:{name}: expected a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the caller's own code
        raise ValueError(f"--rl {file}:{name}: the file cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))) or "none"
        raise ValueError(f"--rl {file}:{name}: the file has no function {name!r}; it has {known}")

    def answered(prompts: Sequence[str], completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return list(function(prompts=prompts, completions=completions, answers=[e.completion for e in examples]))

    answered.__name__ = f"{file.name}:{name}"
    return _checked(answered)


def _checked(reward: Callable[..., Sequence[float]]) -> Judge:
    """Wrap a reward to check its errors, values and time."""

    def judge(completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Rewards of completions."""
        prompts = [example.prompt for example in examples]
        pool = ThreadPool(1)  # its threads are daemons: a reward that never returns must not keep the process alive
        found = pool.apply_async(checked_rewards, (reward, prompts, completions), {"examples": examples})
        pool.close()
        try:
            return found.get(SECONDS)
        except multiprocessing.TimeoutError:
            raise RewardError(
                f"reward {reward.__name__} took longer than {SECONDS:g} s for {len(completions)} completions"
            ) from None

    return judge


def rewarded(run: Run) -> Iterator[Batch]:
    """Sample and score completions of as many prompts as the initialization takes samples."""
    settings, judge = run.settings, judge_of(run.settings)
    examples = {json.dumps(prompt_of(run, example)): example for example in run.train}  # each prompt once

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return judge(completions, [examples[json.dumps(prompt)] for prompt in prompts])

    batches = lorasb.reward_batches(
        run.model,
        run.tokenizer,
        [json.loads(prompt) for prompt in list(examples)[: settings.samples or REWARD_SAMPLES]],
        reward,
        generations=settings.generations,
        max_new_tokens=token_limit(run.train_ids, settings.max_new_tokens),
        temperature=settings.temperature,
        seed=settings.seed,
    )
    return iter(batches)


def grpo_trainer(run: Run, folder: Path) -> MarkedCheckpoints:
    """Create a GRPO trainer on the run's prompts."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class RunGRPOTrainer(MarkedCheckpoints, GRPOTrainer):
        """GRPO with marked checkpoints, and a prompt order that a resumed run repeats."""

        def _get_train_sampler(self, dataset: object = None) -> Sampler:
            sampler: Any = super()._get_train_sampler(dataset)
            # otherwise the generator continues from the previous epoch, which a resumed run skips
            self.set_epoch = lambda epoch: sampler.generator.manual_seed(settings.seed + epoch)
            return sampler

        def create_model_card(self, *args: object, **kwargs: object) -> None:
            """Write no README into `checkpoints/`."""

    def reward(completions: Sequence[Prompt], example: Sequence[int], **columns: object) -> list[float | None]:
        """Rewards of completions, which are texts or chats of one message."""
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [*judge(texts, [run.train[i] for i in example])]

    settings, judge = run.settings, judge_of(run.settings)
    values = argument_values(run, folder) | {
        "num_generations": settings.generations,
        "max_completion_length": token_limit(run.train_ids, settings.max_new_tokens),
        "temperature": settings.temperature,
        "beta": 0.0,
        "gradient_checkpointing": False,  # TRL's default is True; `train` applies this run's setting
        "bf16": False,  # weights have the run's own dtype, and autocast would round R's products again
    }
    run.tokenizer.padding_side = "left"
    return RunGRPOTrainer(
        model=run.model,
        reward_funcs=reward,
        args=on_one_device(GRPOConfig(**values)),
        train_dataset=Dataset.from_list([{"prompt": prompt_of(run, e), "example": i} for i, e in enumerate(run.train)]),
        processing_class=run.tokenizer,
        rollout_func=VLLMSampler(settings.sampler) if settings.sampler else None,
    )


def prompt_of(run: Run, example: Example) -> Prompt:
    """Return the prompt of an example."""
    messages = messages_of(example, run.tokenizer, run.settings.template == "auto")
    return list(messages[:-1]) if messages else example.prompt
