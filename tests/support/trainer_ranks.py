"""Run a Trainer on a tiny model; distributed/test_training.py starts this by torchrun and `accelerate launch`.

trainer_ranks.py FOLDER [--kill STEP] [--again FOLDER] [--resume] [--first] [--bits 16|4]
                 [--dtype float32|bfloat16]
"""

import argparse
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trainer_runs
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from models import make, text
from torch.distributed.tensor import DTensor

import lorasb

STEPS, CUT_AFTER = 6, 5  # every second step is saved
ROWS = [{key: value[0] for key, value in text(1, 12, seed).items()} for seed in range(24)]


def shard_on_cpus() -> None:
    """Make accelerate use FSDP on CPUs too; it supports GPUs only."""
    before = AcceleratorState.__init__

    def init(self: Any, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        before(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def parse(given: Sequence[object] | None = None) -> argparse.Namespace:
    """Options of a run, from the command line unless given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--again", type=Path, help="repeat the last steps here, from a checkpoint of the full run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--first", action="store_true", help="initialize before the Trainer, as DeepSpeed requires")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(None if given is None else [str(one) for one in given])


def main() -> None:
    """Train, save, and write the results; with `--again`, once in full and once from a checkpoint."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    run_all(parse())


def run_all(options: argparse.Namespace, rank: int = 0) -> None:
    """Do the runs of a rank; accelerate reads the rank from the environment."""
    run(options.folder, options)
    if options.again:
        options.resume = True
        run(options.again, options)


def run(folder: Path, options: argparse.Namespace) -> None:
    """One run of a Trainer that leaves its checkpoints, its adapter and found.json in a folder."""
    dtype = getattr(torch, options.dtype)
    base: Any = make("llama", dtype=dtype)
    model: Any = lorasb.patch(lorasb.quantize(base, storage=dtype) if options.bits == 4 else base, r=4)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    momentum = "momentum=0.9"  # plain SGD has no state, and torch cannot load an empty state under FSDP2, on any device
    given = {"optim": "sgd", "optim_args": momentum, "lr_scheduler_type": "constant", "learning_rate": 0.05}
    given |= {"max_steps": STEPS, "per_device_train_batch_size": 4 // size, "max_grad_norm": 0.0}
    arguments = trainer_runs.arguments(folder, **given)
    init = lorasb.InitCallback(num_samples=8, lr=1e-2)
    if options.first:
        share = range(arguments.process_index, 8, arguments.world_size)  # reading it starts the process group
        lorasb.initialize(model, [text(1, 12, seed) for seed in share], lr=1e-2, progress=False)
    callbacks = [init]
    if options.kill and arguments.process_index == arguments.world_size - 1:  # dies silently
        callbacks.append(trainer_runs.At(options.kill, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if options.again and not options.resume and arguments.process_index == 0:
        callbacks.append(trainer_runs.At(CUT_AFTER, lambda: shutil.copytree(folder, options.again)))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(folder / "adapter"))
    if arguments.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = {"losses": losses, "initialized": init.report is not None, "size": size}
        found["sharded"] = any(isinstance(p, DTensor) for p in trainer.model.parameters())
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    finally:  # otherwise gloo's threads sometimes abort the interpreter's exit
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
