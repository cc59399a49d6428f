"""A short run of transformers' Trainer on rows of text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from models import text

ROWS = [{key: value[0] for key, value in text(1, 12, seed).items()} for seed in range(12)]


class At(transformers.TrainerCallback):
    """Call an action after a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def usual(folder: Path) -> dict[str, Any]:
    """Default arguments: four steps of three rows on a CPU, without output, saving every second step."""
    steps = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
    }
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False}
    return {"output_dir": str(folder), **steps, **quiet}


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(**usual(folder) | options)


def trainer(
    model: Any,
    folder: Path,
    callbacks: list[Any],
    data: Any = ROWS,
    optimizers: Any = None,
    collate: Any = None,
    **options: Any,
) -> Any:
    found = transformers.Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=ROWS[:3],
        data_collator=collate,
        callbacks=callbacks,
        optimizers=optimizers or (None, None),
    )
    found.remove_callback(transformers.PrinterCallback)
    return found


def train(*given: Any, resume: Any = None, **options: Any) -> Any:
    """Train with the arguments of `trainer`, and return it."""
    one = trainer(*given, **options)
    one.train(resume_from_checkpoint=resume)
    return one
