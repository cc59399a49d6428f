"""Access to weights that accelerate has offloaded, through the hooks that load them around a module's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def factors_on_device(containers: list[nn.Module], name: str) -> Iterator[list[Tensor]]:
    """The factors of an offloaded adapter on their execution device; offloaded again afterwards.

    accelerate's hooks load a module's parameters around its forward, but a `ParameterDict` has no forward to wrap: the
    hooks are called here.

    Raises:
        RuntimeError: R requires a gradient, which would go to the temporary copy; or the factors have no values at all.
    """
    hooks = _hooks_of(containers, name)
    try:
        for hook, container in zip(hooks, containers, strict=True):
            hook.pre_forward(container)
        yield [c._parameters[name] for c in containers]  # type: ignore[misc]
    finally:
        for hook, container in zip(hooks, containers, strict=True):
            hook.post_forward(container, None)


def _hooks_of(containers: list[nn.Module], name: str) -> list[Any]:
    """accelerate's hook of each container."""
    if torch.is_grad_enabled() and any(c._parameters[name].requires_grad for c in containers):  # type: ignore[union-attr]
        raise RuntimeError(
            f"adapter {name!r} was offloaded with its base and cannot train so: offload the base model first, then "
            "call lorasb.patch, which leaves A, R and B where the model runs; or evaluate under torch.no_grad()"
        )
    hooks: list[Any] = [getattr(container, "_hf_hook", None) for container in containers]
    if None in hooks:
        raise RuntimeError(f"adapter {name!r} lies on the meta device: load a saved adapter, or move the model")
    return hooks


@contextmanager
def weight_present(base: nn.Module) -> Iterator[None]:
    """Inside, an offloaded weight of a base layer is on its execution device; other weights are not touched."""
    hook: Any = getattr(base, "_hf_hook", None)
    weight = base._parameters.get("weight")
    if hook is None or weight is None or not weight.is_meta:
        yield
        return
    hook.pre_forward(base)
    try:
        yield
    finally:
        hook.post_forward(base, None)


def has_weight_values(base: nn.Module) -> bool:
    """True if a base layer's storage has values, on a device or where accelerate has offloaded it."""
    weight = getattr(base, "weight", None)
    storage = [weight] if isinstance(weight, Tensor) else [*base.parameters(), *base.buffers()]
    offloaded = getattr(base, "_hf_hook", None) is not None
    return bool(storage) and (offloaded or not any(tensor.is_meta for tensor in storage))
