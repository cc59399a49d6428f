"""Members of a group: which layers one call computes on the same x, and that call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import lora_sb_linear_group
from ..utils.dtypes import SIXTEEN_BIT
from . import row_cores
from .token_rows import Rows

if TYPE_CHECKING:
    from .linear import LoRASBLinear


def compute(members: list[LoRASBLinear], x: Tensor, rows: Rows | None) -> list[Tensor]:
    """y_i [..., out_i] of members with equal `group_key`."""
    options: dict[str, Any]
    if rows is not None:
        parts = [row_cores.of_rows(member, rows) for member in members]
        adapters = [(part.a, part.cores, part.b, part.scaling) for part in parts]
        options = {"index": parts[0].places}
    else:
        name = members[0].active_adapters[0]
        adapters = [(m.lorasb_A[name], m.lorasb_R[name], m.lorasb_B[name], m.scaling[name]) for m in members]
        options = {"dropout": members[0].lora_dropout[name] if members[0].training else 0.0}
    a, cores, b, scalings = zip(*adapters, strict=True)
    weights, biases = [m.base_weight() for m in members], [m.bias for m in members if m.bias is not None]
    return lora_sb_linear_group(members[0].on_base_dtype(x), weights, a, cores, b, biases, scalings, **options)


def group_key(layer: LoRASBLinear, x: Tensor, rows: Rows | None = None) -> tuple[Any, ...] | None:
    """A key that is equal for layers which can be computed together on x; None: compute this one alone."""
    if layer.disable_adapters or layer.merged or layer.quantized() is not None:  # the group op takes dense weights
        return None
    # A patched or offloaded base has to run its own forward.
    if layer.fan_in_fan_out or _is_watched(layer) or hasattr(layer, "_hf_hook") or layer.base_must_run():
        return None
    weight = layer.weight
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != layer.in_features or weight.device != x.device:
        return None
    adapters = _key_of_active(layer) if rows is None else _key_of_rows(layer, rows)
    return None if adapters is None else (*adapters, weight.dtype, layer.bias is None, layer.training)


def _is_watched(layer: LoRASBLinear) -> bool:
    """True if hooks have to see their own layer run; those that only say which adapters its rows have do not."""
    hooks = (layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    pre_hooks = list(layer._forward_pre_hooks.values())  # a copy: another thread's batch may begin or end
    return any(hooks) or not all(getattr(hook, "names_rows", False) for hook in pre_hooks)


def _key_of_active(layer: LoRASBLinear) -> tuple[Any, ...] | None:
    """Of the one active adapter."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lorasb_R:
        return None
    name, core = names[0], layer.lorasb_R[names[0]]
    if layer.equivalent[name] or layer.wide_factors[name] or core.dtype in SIXTEEN_BIT or not _may_train(layer, name):
        return None
    return name, layer.r[name], core.dtype, layer.lora_dropout[name] if layer.training else 0.0


def _key_of_rows(layer: LoRASBLinear, rows: Rows) -> tuple[Any, ...] | None:
    """Of rows whose adapters one call computes."""
    names = row_cores.in_one_call(layer, rows)
    if names is None or layer.any_wide or not all(_may_train(layer, name) for name in names):
        return None
    return names, *((layer.r[name], layer.lorasb_R[name].dtype) for name in names[:1])


def _may_train(layer: LoRASBLinear, name: str) -> bool:
    """False for an adapter that is trained before it is initialized: the layer's own forward raises the error."""
    return not (torch.is_grad_enabled() and layer.lorasb_R[name].requires_grad and not layer.is_initialized(name))
