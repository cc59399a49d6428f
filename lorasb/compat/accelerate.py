"""Private names of accelerate, and of DeepSpeed, which marks the same modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import Private

if TYPE_CHECKING:
    from accelerate.hooks import ModelHook

VERIFIED = "accelerate 1.10 and 1.15; DeepSpeed from 0.17 on, which `make test-all` installs"
HOOK, PARTITIONED = "_hf_hook", "ds_id"
PRIVATE = {
    "hook": Private(
        f"torch.nn.Module().{HOOK}",
        "loads an offloaded module's weights when they are read outside of its forward; names its device",
        "offloaded models raise: their weights are on the meta device",
    ),
    "ds_id": Private(
        f"torch.nn.Parameter().{PARTITIONED}",
        "detects parameters that DeepSpeed ZeRO-3 partitions",
        "saving under ZeRO-3 raises: A and B are empty",
    ),
}


def hook_of(module: nn.Module) -> ModelHook | None:
    return vars(module).get(HOOK)  # in every forward: `nn.Module.__getattr__` takes longer than a small product


def is_managed(parameter: Tensor | None) -> bool:
    return hasattr(parameter, PARTITIONED)


def is_partitioned(parameter: Tensor) -> bool:
    """True if ZeRO-3 has partitioned the parameter, so that this rank has an empty tensor."""
    # while a parameter is gathered, it has its full numel
    return is_managed(parameter) and parameter.numel() == 0
