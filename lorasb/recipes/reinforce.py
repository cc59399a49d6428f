"""`lorasb finetune --rl`: a run by TRL's GRPOTrainer, with the checkpoints, callbacks and results of any other."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from ..distributed.process_group import Processes
from .callbacks import Bar, Finite, Judging, Ordering, Saving
from .examples.tasks import Example
from .examples.tokenization import messages_of
from .marked_checkpoints import MarkedCheckpoints
from .prepare import Run, checkpoint_activations
from .problems.evaluation import token_limit
from .rewards import Judge, judge_of
from .settings import Settings
from .signals import Stop
from .train import argument_values, on_one_device


def check(settings: Settings) -> None:
    """Raise an ImportError without TRL, and a ValueError where `--rl` names no reward."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError("--rl trains with TRL: pip install trl")
    judge_of(settings)


def longest_completion(run: Run) -> int:
    """Tokens of a sampled completion, at most."""
    return token_limit(run.train_ids, run.settings.max_new_tokens)


def trainer(run: Run, folder: Path, identity: dict[str, Any], earlier_seconds: float, stop: Stop) -> Any:
    """A GRPO trainer of the run's prompts."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class RunGRPOTrainer(MarkedCheckpoints, GRPOTrainer):
        """GRPO with marked checkpoints, and an order of prompts that a resumed run has too."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            order.sampler = super()._get_train_sampler(dataset)
            return order.sampler

    order = _PromptOrder(run.settings.seed)
    settings, processes = run.settings, Processes()
    if settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    values = argument_values(run, folder, processes.world_size)
    values |= {
        "num_generations": settings.generations,
        "max_completion_length": longest_completion(run),
        "temperature": settings.temperature,
        "beta": 0.0,
        "gradient_checkpointing": False,  # TRL's own is True; this run's is set above, by its own setting
        "bf16": False,  # weights have the run's own dtype, and autocast would round R's products again
    }
    run.tokenizer.padding_side = "left"
    made = RunGRPOTrainer(
        model=run.model,
        reward_funcs=_reward(judge_of(settings), run.train),
        args=on_one_device(GRPOConfig(**values)),
        train_dataset=Dataset.from_list([_row(run, i, example) for i, example in enumerate(run.train)]),
        processing_class=run.tokenizer,
    )
    made.identity, made.earlier_seconds = identity, earlier_seconds
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    if settings.eval_steps:
        judging = Judging(run, settings.eval_steps)
        judging.trainer = made
        made.add_callback(judging)
    for callback in (Bar(), Finite(), Ordering(order), Saving(settings.save_steps, stop)):
        made.add_callback(callback)
    return made


class _PromptOrder:
    """The epoch's order of prompts by its number: TRL's sampler draws on from the epoch before, which a resumed run
    has not passed through."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sampler: Any = None

    def set_epoch(self, epoch: int) -> None:
        """Begin the order of an epoch; the first one's is TRL's own."""
        self.sampler.generator.manual_seed(self.seed + epoch)


def prompt_of(run: Run, example: Example) -> Any:
    """What is asked: a text, or a chat before its last answer."""
    messages = messages_of(example, run.tokenizer, run.settings.template == "auto")
    return list(messages[:-1]) if messages else example.prompt


def _row(run: Run, index: int, example: Example) -> dict[str, Any]:
    """A prompt, and where its example is."""
    return {"prompt": prompt_of(run, example), "example": index}


def _reward(judge: Judge, examples: Sequence[Example]) -> Any:
    """The reward as TRL calls it."""

    def reward(completions: Sequence[Any], example: Sequence[int], **columns: Any) -> list[float]:
        """Rewards of completions, which are texts or chats of one message."""
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return judge(texts, [examples[i] for i in example])

    return reward
