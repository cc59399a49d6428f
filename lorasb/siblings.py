"""Layers that read the same x (q/k/v, gate/up) as one call: the first computes all, the others take their results.

Nothing in the model's own code changes. Who belongs together is recognised by name; that they do get the very same
tensor is checked at every call, and a layer that does not is computed alone and leaves its group. No result outlives
the forward of the module that holds the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .functional import lora_sb_linear_group

if TYPE_CHECKING:
    from .linear import LoRASBLinear

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


class Siblings:
    """Layers of one parent that are expected to read the same x.

    Args:
        parent: the module that holds them; only inside its forward are results kept.
        members: two or more layers of the same `in_features`.
    """

    def __init__(self, parent: nn.Module, members: list[LoRASBLinear]) -> None:
        self.parent, self.members = parent, members
        self._depth = 0  # of the parent's forward, which a checkpoint may run again inside another
        self._waiting: dict[int, Tensor] = {}  # results by a member's place
        self._x: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._hooks = (
            parent.register_forward_pre_hook(self._parent_begins),
            parent.register_forward_hook(self._parent_ends, always_call=True),
        )
        for member in members:
            member.siblings = self

    def take(self, layer: LoRASBLinear, x: Tensor) -> Tensor | None:
        """y of one member, computed with the others' or waiting since then; None: it is to be computed alone."""
        place = next((i for i, member in enumerate(self.members) if member is layer), None)
        if place is None or not self._depth or torch.compiler.is_compiling() or x.is_inference():
            return None
        if place in self._waiting:
            if x is self._x and self._key == self._state(x):
                y = self._waiting.pop(place)
                if not self._waiting:
                    self.clear()
                return y
            self._split()
            return layer.siblings.take(layer, x) if layer.siblings is not None else None
        if x is self._x:
            return None  # the others belong together, and this one does not
        self.clear()
        together = self._alike(layer, x)
        if len(together) < 2:
            return None
        self._waiting = dict(zip(together, self._compute([self.members[i] for i in together], x), strict=True))
        self._x, self._key = x, self._state(x)
        return self._waiting.pop(place)

    def clear(self) -> None:
        """Forget every result."""
        self._waiting, self._x, self._key = {}, None, ()

    def dissolve(self) -> None:
        """Let every member go, and the parent."""
        self.clear()
        for hook in self._hooks:
            hook.remove()
        for member in self.members:
            member.siblings = None
        self.members = []

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """What must not have changed between the first member's call and another's."""
        names = tuple(tuple(member.active_adapters) for member in self.members)
        autocast = torch.is_autocast_enabled(x.device.type)
        return x._version, torch.is_grad_enabled(), autocast, names, tuple(m.disable_adapters for m in self.members)

    def _alike(self, layer: LoRASBLinear, x: Tensor) -> list[int]:
        """The places of the members that can be computed in one call with this one, as each would be alone."""
        wanted = kind(layer, x)
        return [i for i, member in enumerate(self.members) if kind(member, x) == wanted] if wanted is not None else []

    def _compute(self, members: list[LoRASBLinear], x: Tensor) -> list[Tensor]:
        name = members[0].active_adapters[0]
        biases = [member.bias for member in members if member.bias is not None]
        return lora_sb_linear_group(
            members[0].on_base_dtype(x),
            [member.base_weight() for member in members],
            [member.lorasb_A[name] for member in members],
            [member.lorasb_R[name] for member in members],
            [member.lorasb_B[name] for member in members],
            biases,
            [member.scaling[name] for member in members],
        )

    def _split(self) -> None:
        """Part those that read x from those that did not; two or more of a kind stay together."""
        groups: list[list[LoRASBLinear]] = [[], []]
        for i, member in enumerate(self.members):
            groups[i in self._waiting].append(member)
        depth = self._depth
        self.dissolve()
        for members in groups:
            if len(members) > 1:
                Siblings(self.parent, members)._depth = depth

    def _parent_begins(self, parent: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth += 1

    def _parent_ends(self, parent: nn.Module, arguments: Any, result: Any) -> None:
        """Drop what was not taken; after a forward that ended as it should, that means that it never will be."""
        if torch.compiler.is_compiling():
            return
        if self._waiting and result is not None:
            self._split()
        self._depth = max(0, self._depth - 1)
        self.clear()


def kind(layer: LoRASBLinear, x: Tensor) -> tuple[Any, ...] | None:
    """What layers must have in common to be computed together on x; None: this one is to be computed alone."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lorasb_R or layer.disable_adapters or layer.merged:
        return None
    name = names[0]
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if layer.fan_in_fan_out or any(hooks) or hasattr(layer, "_hf_hook") or layer.base_must_run():
        return None
    if layer.equivalent[name] or (layer.training and layer.lora_dropout[name] > 0.0):
        return None
    core, weight = layer.lorasb_R[name], layer.weight
    if torch.is_grad_enabled() and core.requires_grad and not layer.is_initialized(name):
        return None
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != layer.in_features or weight.device != x.device:
        return None
    return name, layer.r[name], weight.dtype, core.dtype, layer.bias is None, layer.training


def form(model: nn.Module) -> None:
    """Find the siblings of a model anew."""
    dissolve(model)
    for parent, members in _candidates(model):
        Siblings(parent, members)


def dissolve(model: nn.Module) -> None:
    """Take every group of a model apart."""
    for module in model.modules():
        siblings = getattr(module, "siblings", None)
        if isinstance(siblings, Siblings):
            siblings.dissolve()


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, list[LoRASBLinear]]]:
    for parent in model.modules():
        for names in NAMES:
            children: list[Any] = [parent._modules.get(name) for name in names]
            members: dict[int, list[Any]] = {}
            for child in children:
                if hasattr(child, "siblings"):
                    members.setdefault(child.in_features, []).append(child)
            for together in members.values():
                if len(together) > 1:
                    yield parent, together
