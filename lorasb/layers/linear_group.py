"""Layers that read the same x (q/k/v, gate/up) as one call: the first computes all, the others take their results.

Nothing in the model's own code changes. Who belongs together is recognized by name; that they do get the very same
tensor is checked at every call, and a layer that does not is computed alone and leaves its group. No result outlives
the forward of the module that holds the layers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import lora_sb_linear_group

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


@dataclass
class Pending:
    """Results that members have not taken yet.

    Attributes:
        x: what all of them read.
        state: what must not have changed when another member comes for its result.
        results: y by the member's place in the group.
    """

    x: Tensor
    state: tuple[Any, ...]
    results: dict[int, Tensor]

    def holds(self, place: int, x: Tensor, state: tuple[Any, ...]) -> bool:
        """True if a member's result is there, and was computed from this very x in this very state."""
        return place in self.results and x is self.x and state == self.state


class Siblings:
    """Layers of one parent that are expected to read the same x.

    Their results belong to one autograd node: to go backward through them one after another, keep the graph
    (`retain_graph=True`) or take the groups apart with `dissolve(model)`.

    Args:
        parent: the module that holds them; only inside its forward are results kept. It is referred to weakly.
        names: two or more children of the same `in_features`.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._parent: weakref.ref[nn.Module] | None = weakref.ref(parent)
        self._inside: tuple[Any, ...] | None = None  # who runs the parent's forward
        self._held: Pending | None = None
        self._hooks = (
            parent.register_forward_pre_hook(self._parent_begins).id,
            parent.register_forward_hook(self._parent_ends, always_call=True).id,
        )
        for member in self.members:
            member.siblings = self

    @property
    def members(self) -> list[LoRASBLinear]:
        """The layers, as they are now."""
        parent = self._parent() if self._parent is not None else None
        children: list[Any] = [parent._modules.get(name) for name in self.names] if parent is not None else []
        return [child for child in children if hasattr(child, "siblings")]

    def take(self, layer: LoRASBLinear, x: Tensor) -> Tensor | None:
        """y of one member, computed with the others' or waiting since then; None: it is to be computed alone."""
        if torch.compiler.is_compiling() or x.is_inference() or self._inside != _here():
            return None
        members, pending = self.members, self._held
        place = next((i for i, member in enumerate(members) if member is layer), None)
        if place is None:
            return None
        if pending is not None and place in pending.results:
            if pending.holds(place, x, self._state(members, x)):
                return pending.results.pop(place)
            self._split(pending.results)
            return layer.siblings.take(layer, x) if layer.siblings is not None else None
        if pending is not None and x is pending.x:
            return None  # the others belong together, and this one does not
        self.clear()
        wanted = kind(layer, x)
        together = [i for i, member in enumerate(members) if kind(member, x) == wanted] if wanted is not None else []
        if len(together) < 2:
            return None
        results = dict(zip(together, _compute([members[i] for i in together], x), strict=True))
        y = results.pop(place)
        self._held = Pending(x, self._state(members, x), results)
        return y

    def clear(self) -> None:
        """Forget every result."""
        self._held = None

    def dissolve(self) -> None:
        """Let every member go, and the parent."""
        self.clear()
        for member in self.members:
            member.siblings = None
        parent = self._parent() if self._parent is not None else None
        if parent is not None:
            before, after = self._hooks
            parent._forward_pre_hooks.pop(before, None)
            parent._forward_hooks.pop(after, None)
            parent._forward_hooks_always_called.pop(after, None)
        self.names, self._parent = (), None

    @staticmethod
    def _state(members: list[LoRASBLinear], x: Tensor) -> tuple[Any, ...]:
        """What must not have changed between the first member's call and another's."""
        autocast = torch.is_autocast_enabled(x.device.type)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        each = [
            (*m.active_adapters, m.disable_adapters, *(core._version for core in m.lorasb_R.values())) for m in members
        ]
        return x._version, torch.is_grad_enabled(), autocast, stream, *each

    def _split(self, waiting: dict[int, Tensor]) -> None:
        """Part those that read x from those that did not; two or more of a kind stay together."""
        parent, inside = self._parent, self._inside
        groups: tuple[list[str], list[str]] = ([], [])
        for i, name in enumerate(self.names):
            groups[i in waiting].append(name)
        self.dissolve()
        for names in groups:
            if len(names) > 1 and parent is not None and (module := parent()) is not None:
                Siblings(module, names)._inside = inside

    def _parent_begins(self, parent: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self.clear()
            self._inside = _here()

    def _parent_ends(self, parent: nn.Module, arguments: Any, result: Any) -> None:
        """Drop what was not taken; after a forward that ended as it should, that means that it never will be."""
        if torch.compiler.is_compiling():
            return
        self._inside, pending = None, self._held
        self.clear()
        if pending is not None and pending.results and result is not None:
            self._split(pending.results)

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings | None:
        """With its parent a group is copied; a layer that is copied alone has none."""
        parent = memo.get(id(self._parent())) if self._parent is not None else None
        if parent is None:
            return None
        memo[id(self)] = new = object.__new__(Siblings)
        new.names, new._hooks, new._parent = self.names, self._hooks, weakref.ref(parent)
        new._inside = new._held = None
        return new

    def __getstate__(self) -> dict[str, Any]:
        """A pickled group is none: its layers compute alone."""
        return {"names": (), "_hooks": self._hooks, "_parent": None, "_inside": None, "_held": None}


def _here() -> tuple[Any, ...]:
    """This thread, and what catches saved tensors: a checkpoint inside the parent's forward is another place."""
    return threading.get_ident(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _compute(members: list[LoRASBLinear], x: Tensor) -> list[Tensor]:
    name = members[0].active_adapters[0]
    return lora_sb_linear_group(
        members[0].on_base_dtype(x),
        [member.base_weight() for member in members],
        [member.lorasb_A[name] for member in members],
        [member.lorasb_R[name] for member in members],
        [member.lorasb_B[name] for member in members],
        [member.bias for member in members if member.bias is not None],
        [member.scaling[name] for member in members],
    )


def kind(layer: LoRASBLinear, x: Tensor) -> tuple[Any, ...] | None:
    """What layers must have in common to be computed together on x; None: this one is to be computed alone."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lorasb_R or layer.disable_adapters or layer.merged:
        return None
    name = names[0]
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if layer.quantized() is not None:  # each multiplies its own panels
        return None
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
    for parent, names in list(_candidates(model)):
        Siblings(parent, names)


def dissolve(model: nn.Module) -> None:
    """Take every group of a model apart."""
    for module in model.modules():
        siblings = getattr(module, "siblings", None)
        if isinstance(siblings, Siblings):
            siblings.dissolve()


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    for parent in model.modules():
        for names in NAMES:
            together: dict[int, list[str]] = {}
            for name in names:
                child: Any = parent._modules.get(name)
                if hasattr(child, "siblings"):
                    together.setdefault(child.in_features, []).append(name)
            yield from ((parent, members) for members in together.values() if len(members) > 1)
