"""Groups of layers that read the same x (q/k/v, gate/up): the first call computes all, the others take theirs.

The model's own code is not changed. Groups are formed by the layers' names; every call checks that a member gets the
very same tensor, and a layer that gets another one leaves its group before the next forward. Results are dropped at the
end of the forward of the parent module.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..compat import torch as private
from ..compat.accelerate import hook_of
from ..functional import lora_sb_linear_group
from ..ops.calls import autocast_on
from ..utils.precision import SIXTEEN_BIT
from .adapter_state import Rows
from .linear import LoRASBLinear, calls_for, is_wide, row_cores


def compute(members: list[LoRASBLinear], x: Tensor, rows: Rows | None) -> list[Tensor]:
    """Return the y_i [..., out_i] of members with equal `group_key`."""
    index, dropout = None, 0.0
    if rows is not None:
        (names,), _ = calls_for(members[0], rows)  # those of all members: they are part of the group key
        parts = [row_cores(member, names, rows) for member in members]
        adapters = [part[:4] for part in parts]
        index = parts[0][4]
    else:
        name = members[0].active_adapters[0]
        adapters = [(m.lorasb_A[name], m.lorasb_R[name], m.lorasb_B[name], m.adapters[name].scaling) for m in members]
        dropout = members[0].adapters[name].lora_dropout if members[0].training else 0.0
    a, cores, b, scalings = zip(*adapters, strict=True)
    weights, biases = [m.base.parameter() for m in members], [m.bias for m in members if m.bias is not None]
    x = members[0].base.cast(x)
    return lora_sb_linear_group(x, weights, a, cores, b, biases, scalings, dropout=dropout, index=index)


def group_key(layer: LoRASBLinear, x: Tensor, rows: Rows | None = None) -> tuple[object, ...] | None:
    """Return a key that is equal for layers that can be computed together on x; None: compute this one alone."""
    if layer.disable_adapters or layer.merged or layer.base.quantized() is not None:  # the group op takes dense weights
        return None
    # A patched or offloaded base has to run its own forward.
    if layer.base.fan_in_fan_out or _is_watched(layer) or hook_of(layer) is not None or layer.base.must_run():
        return None
    weight = layer.weight
    names = tuple(layer.active_adapters)
    if rows is not None:
        calls, alone = calls_for(layer, rows)
        names = calls[0] if len(calls) == 1 and not alone else ()
    if not names or not all(name in layer.lorasb_R for name in names) or is_wide(layer, names):
        return None
    # For an adapter that is trained before it is initialized, the layer's own forward raises the error.
    training = [name for name in names if torch.is_grad_enabled() and layer.lorasb_R[name].requires_grad]
    if not all(layer.is_initialized(name) for name in training):
        return None
    state, core_dtype = layer.adapters[names[0]], layer.lorasb_R[names[0]].dtype
    if rows is None and (len(names) > 1 or state.equivalent_gradient or core_dtype in SIXTEEN_BIT):
        return None
    dropout = state.lora_dropout if rows is None and layer.training else 0.0
    return names, state.r, core_dtype, dropout, weight.dtype, layer.bias is None, layer.training


def _is_watched(layer: LoRASBLinear) -> bool:
    """True if hooks need the layer itself to run; hooks that only choose adapters by row do not."""
    own = vars(layer)
    others = own[private.HOOKS] or own[private.BACKWARD_HOOKS] or own[private.BACKWARD_PRE_HOOKS]
    pre_hooks = list(own[private.PRE_HOOKS].values())  # a copy: other threads may change them
    return bool(others) or not all(getattr(hook, "names_rows", False) for hook in pre_hooks)


# Children of one module that read the same input, in the architectures that transformers and diffusers have.
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
class Forward:
    """A forward of the parent in one thread, with the results that members have not taken yet."""

    parent: weakref.ref[nn.Module]
    # The innermost saved-tensor hooks at its start. Gradient checkpointing around some of the layers installs others:
    # a result must not cross into or out of a region that recomputes its layers in backward without the others.
    saving: object
    x: Tensor | None = None  # the input that results were computed from
    state: tuple[object, ...] = ()  # `_state` at the computation; results are valid while it is unchanged
    results: dict[str, Tensor] = field(default_factory=dict)  # y [..., out] by the member's name


class FusedGroup:
    """Two or more children of one parent, with the same `in_features`, that are expected to read the same x.

    Their results belong to one autograd node: to call backward on them one after another, keep the graph
    (`retain_graph=True`) or separate the layers with `detach(model)`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)  # not the layers, so that a copied parent's hooks find the copies
        self._untaken: set[str] = set()  # members that did not take their results: separated before the next forward
        self._thread = threading.local()  # `forward`: each thread has its own x

    def __reduce__(self) -> tuple[type[FusedGroup], tuple[tuple[str, ...]]]:
        return FusedGroup, (self.names,)

    def fused_output(self, layer: LoRASBLinear, x: Tensor, rows: Rows | None) -> Tensor | None:
        """Return y of one member, computed now or earlier with the others'; None: compute it alone."""
        # A compiled graph cannot carry results from one layer to another, and inference tensors have no version.
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        forward: Forward | None = getattr(self._thread, "forward", None)
        if forward is None or forward.saving != private.saved_tensor_hooks(True):
            return None
        members = self._members(forward.parent())
        if layer not in members:
            return None
        if forward.x is x and forward.state == _state(members, x, rows):
            return forward.results.pop(members[layer], None)  # None: not like the others in rank, dtype, hooks ...
        if members[layer] in forward.results:  # it reads another x, or the state changed
            self._untaken = self._untaken or set(forward.results)
        forward.x, forward.results = None, {}
        key = group_key(layer, x, rows)
        if key is None:
            return None
        alike = [member for member in members if member is layer or group_key(member, x, rows) == key]
        if len(alike) < 2:
            return None
        ys = compute(alike, x, rows)
        forward.x, forward.state = x, _state(members, x, rows)
        forward.results = {members[member]: y for member, y in zip(alike, ys, strict=True)}
        return forward.results.pop(members[layer])

    def _members(self, parent: nn.Module | None) -> dict[LoRASBLinear, str]:
        """Map layers to their names; a child may have been replaced since the group was formed."""
        children = {} if parent is None else {parent._modules.get(name): name for name in self.names}
        return {m: n for m, n in children.items() if isinstance(m, LoRASBLinear) and m.fused_output is not None}

    def begins(self, parent: nn.Module, arguments: object) -> None:
        """Begin a forward of the parent, after separating members that did not share x in earlier forwards."""
        if torch.compiler.is_compiling():
            return
        # not in backward: a forward that checkpointing repeats has to save what it saved the first time
        if (apart := self._untaken) and private.graph_task() == -1:
            halves = [tuple(n for n in self.names if n not in apart), tuple(n for n in self.names if n in apart)]
            self.names, self._untaken = max(halves, key=len), set()  # at most three members: one half is no group
        if len(self.names) > 1:
            self._thread.forward = Forward(weakref.ref(parent), private.saved_tensor_hooks(True))

    def ends(self, parent: nn.Module, arguments: object, result: object) -> None:
        """Drop results not taken. `result` is None after an exception: only a complete forward shows who shares x."""
        if torch.compiler.is_compiling():
            return
        forward = vars(self._thread).pop("forward", None)
        if forward is not None and result is not None:
            self._untaken = self._untaken or set(forward.results)


def _state(members: Iterable[LoRASBLinear], x: Tensor, rows: Rows | None) -> tuple[object, ...]:
    """Return the state that must not change between the first member's call and another's."""
    # Versions show in-place writes to x or R; results computed on another CUDA stream may not be ready on this one.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    adapters = [
        (*m.active_adapters, m.disable_adapters, *(core._version for core in list(m.lorasb_R.values())))
        for m in members
    ]
    return x._version, rows, torch.is_grad_enabled(), autocast_on(x.device.type), stream, *adapters


def wanted(*asked: bool | None) -> bool:
    """Return False if one adapter's `group` is False, else True if one is True, else whether there is a GPU."""
    # host time 21 instead of 45 µs (benchmarks.kernels.host_time); on CPUs 0.97 to 1.04 times as long (cpu.json)
    return False not in asked and (True in asked or torch.cuda.is_available())


def attach(model: nn.Module) -> None:
    """Attach groups to the layers of a model that has none."""
    for parent in model.modules():
        for names in NAMES:
            by_in_features: dict[int, dict[str, LoRASBLinear]] = {}  # k and v may read a wider input than q
            for name in names:
                child = parent._modules.get(name)
                if isinstance(child, LoRASBLinear):
                    by_in_features.setdefault(child.in_features, {})[name] = child
            for members in by_in_features.values():
                if len(members) > 1:
                    group = FusedGroup(members)
                    parent.register_forward_pre_hook(group.begins)
                    parent.register_forward_hook(group.ends, always_call=True)  # also after an exception
                    for member in members.values():
                        member.fused_output = group.fused_output


def detach(model: nn.Module) -> None:
    """Dissolve all groups of a model: each layer is then computed alone."""
    for module in model.modules():
        if isinstance(module, LoRASBLinear):
            module.fused_output = None
        private.remove_forward_hooks(module, FusedGroup)
