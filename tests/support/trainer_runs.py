"""A short run of transformers' Trainer on rows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from models import text

ROWS = [{key: value[0] for key, value in text(1, 12, seed).items()} for seed in range(12)]


def train(
    model: Any, folder: Path, callbacks: list[Any], data: Any = ROWS, optimizers: Any = None, **options: Any
) -> Any:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 3,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            "dataloader_pin_memory": False,
        }
        | {key: value for key, value in options.items() if key != "resume"}
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=ROWS[:3],
        callbacks=callbacks,
        optimizers=optimizers or (None, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return trainer
