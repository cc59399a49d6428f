"""Private names of torch. Every fallback is correct but slower: kernels are then called through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.autograd import forward_ad

from . import Private, find, several


def _yes(*_: object) -> bool:
    return True


VERIFIED = "torch 2.10 to 2.13"
SAME_WIDTHS = "_qkv_same_embed_dim"
# a module's hook dictionaries, which every forward checks
PRE_HOOKS, HOOKS = "_forward_pre_hooks", "_forward_hooks"
BACKWARD_PRE_HOOKS, BACKWARD_HOOKS = "_backward_pre_hooks", "_backward_hooks"
DISPATCHED = "every call goes through PyTorch's dispatcher"
PLANS = "`lorasb plan` counts a step without memory for it"
DISPATCH, NO_INITIALIZE = "torch.utils._python_dispatch", "`lorasb.initialize` raises an ImportError"
FSDP = "torch.distributed.fsdp.FullyShardedDataParallel()._fsdp_wrapped_module"
NO_PLAN, NO_FORWARD = "`lorasb plan` raises an ImportError", "every module's forward raises an AttributeError"
HEADERS = (
    *("torch/csrc/autograd/python_variable.h", "ATen/PythonTorchFunctionTLS.h"),
    *("c10/core/impl/TorchDispatchModeTLS.h", "c10/core/impl/LocalDispatchKeySet.h"),
)
PRIVATE = {
    "any_autocast": Private(
        "torch._C._is_any_autocast_enabled", "skips the query per device", "autocast is queried per device", _yes
    ),
    "dispatch_modes": Private(
        "torch._C._len_torch_dispatch_stack", "detects `TorchDispatchMode`, which has to see every op", DISPATCHED, _yes
    ),
    "function_modes": Private(
        "torch._C._len_torch_function_stack", "detects `TorchFunctionMode`, which has to see every op", DISPATCHED, _yes
    ),
    "transforms_active": Private(
        "torch._C._are_functorch_transforms_active",
        "detects `torch.func` transforms, which get composed torch operations",
        "every call uses composed torch operations",
        _yes,
    ),
    "has_storage": Private(
        "torch._C._has_storage",
        "detects gradients in a batch (`is_grads_batched=True`), which get composed torch operations",
        "some kernels raise PyTorch's error for an op without a batching rule",
        lambda _: True,
    ),
    "forward_level": Private(
        "torch.autograd.forward_ad._current_level",
        "detects forward-mode differentiation",
        "forward mode raises PyTorch's error for an op without a rule",
    ),
    "tracing_state": Private("torch._C._get_tracing_state", "detects `torch.jit.trace`", DISPATCHED, _yes),
    "is_wrapped": Private(
        "torch._C._functorch.is_functorch_wrapped_tensor", "detects tensors of ended transforms", DISPATCHED, _yes
    ),
    "graph_task": Private(
        "torch._C._current_graph_task_id",
        "detects that checkpointing repeats a forward in backward",
        "groups of layers may be separated in backward; results are the same",
        lambda: -1,
    ),
    "saved_tensor_hooks": Private(
        "torch._C._autograd._top_saved_tensors_default_hooks",
        "compares the checkpointed regions of layers that share an input",
        "such layers are computed separately",
        lambda _: object(),  # equal to no other
    ),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor.FakeTensorMode", PLANS, NO_PLAN),
    **several(PLANS, NO_PLAN, f"{DISPATCH}.TorchDispatchMode", "torch.utils._pytree.tree_leaves"),
    **several("finds a quantizer's tensors", NO_INITIALIZE, f"{DISPATCH}.is_traceable_wrapper_subclass"),
    **several("reshapes a result that callers may change", "composed calls raise", "torch.ops.aten._unsafe_view"),
    "is_zerotensor": Private(
        "torch.Tensor._is_zerotensor", "detects lazy zeros, which a kernel must not read", DISPATCHED, _yes
    ),
    "is_functional": Private("torch._is_functional_tensor", "detects functionalized tensors", DISPATCHED, _yes),
    "storage": Private(
        "torch.UntypedStorage._cdata",
        "detects tensors that share a storage without an address",
        "`lorasb plan` and prepared launches raise an AttributeError",
    ),
    "conv_forward": Private(
        "torch.nn.Conv1d._conv_forward",
        "computes a convolution's adapter, without its bias",
        "adapters of convolutions raise an AttributeError",
    ),
    "forward_hooks": Private(
        "torch.nn.Module()._forward_hooks",
        "with the other hook dictionaries: detects that a module is observed and must run its own forward",
        NO_FORWARD,
    ),
    **several("skips attribute lookup", NO_FORWARD, "torch.nn.Module()._parameters", "torch.nn.Module()._modules"),
    **several("detects changes of a tensor in place", NO_FORWARD, "torch.Tensor._version"),
    **several(
        "finds the product under a linear's view", "`lorasb.initialize` raises an AttributeError", "torch.Tensor._base"
    ),
    **several(
        "overridden: 4-bit statistics, and a record of a checkpoint's factors",
        "4-bit weights are saved without statistics, and loaded factors count as not initialized",
        *("torch.nn.Module._save_to_state_dict", "torch.nn.Module._load_from_state_dict"),
    ),
    **several("detects `model.compile()`", "such a model is not refused", "torch.nn.Module._compiled_call_impl"),
    **several("removed from names of layers", "names do not match layers under FSDP1", FSDP),
    **several(
        "detects that torch multiplies bf16 in hardware",
        "`--dtype auto` is fp32",
        *("torch.cpu._is_amx_tile_supported", "torch.cpu._is_avx512_bf16_supported"),
    ),
    **several(
        "C++ extension: unpacks tensors, and detects modes that intercept their ops", "eager torch computes", *HEADERS
    ),
    "same_widths": Private(
        f"torch.nn.MultiheadAttention().{SAME_WIDTHS}",
        "TransformerEncoderLayer's kernel reads the weights, unless this is False: an adapter sets it",
        "adapters of attention inside of TransformerEncoderLayer have no effect in evaluation",
    ),
    "OptimizedModule": Private(
        "torch._dynamo.eval_frame.OptimizedModule()._orig_mod", "what `torch.compile` wraps", "pass the module itself"
    ),
}

any_autocast: Callable[[], bool] = find(PRIVATE["any_autocast"])
dispatch_modes: Callable[[], int] = find(PRIVATE["dispatch_modes"])
function_modes: Callable[[], int] = find(PRIVATE["function_modes"])
transforms_active: Callable[[], bool] = find(PRIVATE["transforms_active"])
has_storage: Callable[[Tensor], bool] = find(PRIVATE["has_storage"])
tracing_state: Callable[[], object] = find(PRIVATE["tracing_state"])
is_wrapped: Callable[[Tensor], bool] = find(PRIVATE["is_wrapped"])
graph_task: Callable[[], int] = find(PRIVATE["graph_task"])
saved_tensor_hooks: Callable[[bool], object] = find(PRIVATE["saved_tensor_hooks"])
is_zerotensor: Callable[[Tensor], bool] = find(PRIVATE["is_zerotensor"])
is_functional: Callable[[Tensor], bool] = find(PRIVATE["is_functional"])


def storage_key(storage: UntypedStorage) -> int:
    """Return a number that identifies a storage while it exists, even one without memory."""
    return int(storage._cdata)


def convolve(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return module._conv_forward(x, weight, None)


def remove_forward_hooks(module: nn.Module, owner: type) -> None:
    """Remove the forward pre-hooks and hooks that are methods of an `owner`; copied modules lack their handles."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), owner)]:
            del hooks[number]
            module._forward_hooks_always_called.pop(number, None)


def unwrapped(model: Any) -> Any:
    """The model that torch.compile or DistributedDataParallel wraps, or itself."""
    model = getattr(model, "_orig_mod", model)
    return unwrapped(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def forward_level() -> int:
    """The level of forward-mode differentiation in progress; -1 outside of it."""
    return getattr(forward_ad, "_current_level", -1)  # changes, and is read in every call of an op: not by `find`


def fake_tensor_mode() -> AbstractContextManager[object]:
    """A mode in which tensors have shapes and no memory; an ImportError if this torch has none."""
    mode = find(PRIVATE["FakeTensorMode"])  # at the call: its modules take long to import
    if mode is None:
        raise ImportError(f"expected {PRIVATE['FakeTensorMode'].name}, which this torch lacks: install {VERIFIED}")
    return mode()
