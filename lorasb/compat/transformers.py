"""Private names of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import Private, several

VERIFIED = "transformers 5.3 and 5.24"
LOADED = "_is_hf_initialized"
# attributes with the function that checkpoints a module: of transformers' blocks, and of torch's CheckpointWrapper
CHECKPOINTING, WRAPPED_CHECKPOINTING = "_gradient_checkpointing_func", "checkpoint_fn"
HAS_ADAPTER = "_hf_peft_config_loaded"
GATES = "transformers.integrations.moe"  # the module with the gate of experts that define none
# Flags that transformers sets on experts, with the values that they have for y = D (act(g)·u), [g, u] = G x.
LIKE_MIXTRAL = {
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
PRIVATE = {
    "loaded": Private(
        f"torch.nn.Parameter().{LOADED}",
        "distinguishes parameters loaded from a checkpoint from those with random values",
        "modules missing from a checkpoint are not trained in full unless `modules_to_save` names them",
    ),
    "checkpointing": Private(
        f"transformers.PreTrainedModel().{CHECKPOINTING}",
        "replaced while a batch names adapters by row: backward repeats the forward with the same rows",
        "`adapter_names` with gradient checkpointing raises where backward repeats the forward",
    ),
    "apply_gate": Private(
        f"{GATES}._default_apply_gate",
        "detects experts that compute as Mixtral's do, which are opened into linears",
        "experts of `target_parameters` keep their own forward, with W + s·B R A in place of W",
    ),
    "from_config": Private(
        "transformers.PreTrainedModel._from_config",
        "`lorasb plan` makes the class that a checkpoint names",
        "`lorasb plan` raises an AttributeError",
    ),
    "name_or_path": Private(
        "transformers.PreTrainedConfig()._name_or_path",
        "names the base in an exported adapter, and the hub id of the built-in model",
        "an exported adapter does not name its base",
    ),
    "save_checkpoint": Private(
        "transformers.Trainer._save_checkpoint",
        "overridden: marks a checkpoint as complete",
        "`lorasb finetune` starts from the beginning instead of resuming",
    ),
    "get_train_sampler": Private(
        "transformers.Trainer._get_train_sampler",
        "overridden: batches of examples of similar length, in an order that a resumed run repeats",
        "batches are longer, and differ in a resumed run",
    ),
    **several(
        "overridden: several adapters on one basis, all at once",
        "`lorasb finetune` cannot resume a run with several adapters",
        *("transformers.Trainer._save", "transformers.Trainer._load_from_checkpoint"),
    ),
    "adapters_loaded": Private(
        f"transformers.PreTrainedModel.{HAS_ADAPTER}",
        "reset after a failed `load_adapter` of a transformers model, which leaves no adapter",
        "a model may claim to have an adapter after a failed `load_adapter`",
    ),
    "n_gpu": Private(
        "transformers.TrainingArguments()._n_gpu",
        "one GPU per process, instead of DataParallel",
        "CUDA_VISIBLE_DEVICES has to name one GPU",
    ),
}


def is_loaded(parameter: object) -> bool:
    return bool(getattr(parameter, LOADED, False))


def computes_like_mixtral(experts: nn.Module) -> bool:
    """True for experts that compute y = D (act(g)·u), [g, u] = G x, as Mixtral's and Qwen3-MoE's do."""
    gate = getattr(type(experts), "_apply_gate", None)
    flags = {name: getattr(experts, name, value) for name, value in LIKE_MIXTRAL.items()}
    return getattr(gate, "__module__", None) == GATES and flags == LIKE_MIXTRAL and hasattr(experts, "act_fn")


def from_config(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    return kind._from_config(config, dtype=dtype)


def name_or_path(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def set_name_or_path(config: Any, name: str) -> None:
    config._name_or_path = name


def on_one_device(args: Any) -> Any:
    """The arguments of a process that trains on one GPU."""
    # without a launcher, Trainer would use all GPUs by DataParallel, which multiplies the examples per step
    args._n_gpu = min(args.n_gpu, 1)
    return args
