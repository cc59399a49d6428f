"""A short run of transformers' Trainer on rows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from models import text

ROWS = [{key: value[0] for key, value in text(1, 12, seed).items()} for seed in range(12)]


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    """Of four steps on a CPU, that say nothing and save every second, unless other options are given."""
    usual = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**usual | options)


def train(
    model: Any,
    folder: Path,
    callbacks: list[Any],
    data: Any = ROWS,
    optimizers: Any = None,
    resume: Any = None,
    **options: Any,
) -> Any:
    trainer = transformers.Trainer(
        model=model,
        args=arguments(folder, **{"per_device_train_batch_size": 3, "learning_rate": 1e-2} | options),
        train_dataset=data,
        eval_dataset=ROWS[:3],
        callbacks=callbacks,
        optimizers=optimizers or (None, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
