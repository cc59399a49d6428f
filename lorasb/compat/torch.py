"""Private names of torch. Every fallback is correct and slower: kernels are then called through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from . import Private, find


def _one(*_: Any) -> int:
    return 1


def _always(*_: Any) -> bool:
    return True


def _in_no_graph_task() -> int:
    return -1


def _equal_to_no_other(_: bool) -> object:
    return object()


VERIFIED = "torch 2.10 to 2.13"
DISPATCHED = "every call goes through PyTorch's dispatcher"
PRIVATE = {
    "any_autocast": Private(
        "torch._C._is_any_autocast_enabled",
        "skips the query per device",
        "autocast is queried per device",
        _always,
    ),
    "dispatch_modes": Private(
        "torch._C._len_torch_dispatch_stack",
        "detects `TorchDispatchMode`, whose ops must not be bypassed",
        DISPATCHED,
        _one,
    ),
    "function_modes": Private(
        "torch._C._len_torch_function_stack",
        "detects `TorchFunctionMode`, whose ops must not be bypassed",
        DISPATCHED,
        _one,
    ),
    "transforms_active": Private(
        "torch._C._are_functorch_transforms_active",
        "detects `torch.func` transforms, which get composed torch operations",
        "every call computes by composed torch operations",
        _always,
    ),
    "forward_level": Private(
        "torch.autograd.forward_ad._current_level",
        "detects forward-mode differentiation",
        "forward mode raises PyTorch's error for an op without a rule",
    ),
    "tracing_state": Private("torch._C._get_tracing_state", "detects `torch.jit.trace`", DISPATCHED, _one),
    "is_wrapped": Private(
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "detects tensors of a transform that has ended",
        DISPATCHED,
        _always,
    ),
    "BelowAutograd": Private(
        "torch._C._AutoDispatchBelowAutograd",
        "skips the autograd key where gradients are off",
        "the call passes the autograd key",
        nullcontext,
    ),
    "graph_task": Private(
        "torch._C._current_graph_task_id",
        "detects that checkpointing repeats a forward in backward",
        "groups of layers may be separated in backward; results are the same",
        _in_no_graph_task,
    ),
    "saved_tensor_hooks": Private(
        "torch._C._autograd._top_saved_tensors_default_hooks",
        "compares the checkpointed regions of layers that share an input",
        "such layers are computed separately",
        _equal_to_no_other,
    ),
    "FakeTensorMode": Private(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "`lorasb plan` counts a step without memory for it",
        "`lorasb plan` raises an ImportError",
    ),
}

any_autocast: Callable[[], bool] = find(PRIVATE["any_autocast"])
dispatch_modes: Callable[[], int] = find(PRIVATE["dispatch_modes"])
function_modes: Callable[[], int] = find(PRIVATE["function_modes"])
transforms_active: Callable[[], bool] = find(PRIVATE["transforms_active"])
tracing_state: Callable[[], Any] = find(PRIVATE["tracing_state"])
is_wrapped: Callable[[Tensor], bool] = find(PRIVATE["is_wrapped"])
BelowAutograd: Callable[[], AbstractContextManager[None]] = find(PRIVATE["BelowAutograd"])
graph_task: Callable[[], int] = find(PRIVATE["graph_task"])
saved_tensor_hooks: Callable[[bool], Any] = find(PRIVATE["saved_tensor_hooks"])


def forward_level() -> int:
    """Return the level of forward-mode differentiation in progress; -1 outside of it."""
    level: int = getattr(forward_ad, "_current_level", -1)  # at every call of an op: not by `find`
    return level


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have shapes and no memory.

    Raises:
        ImportError: this torch has no such mode.
    """
    mode = find(PRIVATE["FakeTensorMode"])  # at the call: its modules take long to import
    if mode is None:
        raise ImportError(f"expected {PRIVATE['FakeTensorMode'].name}, which this torch lacks: install {VERIFIED}")
    found: AbstractContextManager[Any] = mode()
    return found
