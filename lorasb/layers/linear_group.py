"""Groups of layers that read the same x (q/k/v, gate/up): the first one called computes all, the others take theirs.

The model's own code is not changed. Groups are formed by the layers' names; every call checks that a member gets the
very same tensor, and a layer that does not is computed alone and leaves its group. Results are dropped at the end of
the forward of the module that holds the layers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compat import torch as private
from ..compat.accelerate import hook_of
from ..functional import lora_sb_linear_group
from ..ops.calls import autocast_on
from ..utils.precision import SIXTEEN_BIT
from .adapted_layer import AdaptedLayer
from .adapter_state import Rows
from .linear import LoRASBLinear, in_one_call, of_rows


def compute(members: list[LoRASBLinear], x: Tensor, rows: Rows | None) -> list[Tensor]:
    """y_i [..., out_i] of members with equal `group_key`."""
    index, dropout = None, 0.0
    if rows is not None:
        parts = [of_rows(member, rows) for member in members]
        adapters = [(part.a, part.cores, part.b, part.scaling) for part in parts]
        index = parts[0].places
    else:
        name = members[0].active_adapters[0]
        adapters = [(m.lorasb_A[name], m.lorasb_R[name], m.lorasb_B[name], m.adapters[name].scaling) for m in members]
        dropout = members[0].adapters[name].dropout if members[0].training else 0.0
    a, cores, b, scalings = zip(*adapters, strict=True)
    weights, biases = [m.base.parameter() for m in members], [m.bias for m in members if m.bias is not None]
    x = members[0].base.cast(x)
    return lora_sb_linear_group(x, weights, a, cores, b, biases, scalings, dropout=dropout, index=index)


def group_key(layer: LoRASBLinear, x: Tensor, rows: Rows | None = None) -> tuple[object, ...] | None:
    """A key that is equal for layers which can be computed together on x; None: compute this one alone."""
    if layer.disable_adapters or layer.merged or layer.quantized() is not None:  # the group op takes dense weights
        return None
    # A patched or offloaded base has to run its own forward.
    if layer.base.fan_in_fan_out or _is_watched(layer) or hook_of(layer) is not None or layer.base.must_run():
        return None
    weight = layer.weight
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != layer.in_features or weight.device != x.device:
        return None
    names = tuple(layer.active_adapters) if rows is None else in_one_call(layer, rows)
    if not names or layer.any_wide or not all(name in layer.lorasb_R for name in names):
        return None
    # For an adapter that is trained before it is initialized, the layer's own forward raises the error.
    training = [name for name in names if torch.is_grad_enabled() and layer.lorasb_R[name].requires_grad]
    if not all(layer.is_initialized(name) for name in training):
        return None
    state, core_dtype = layer.adapters[names[0]], layer.lorasb_R[names[0]].dtype
    if rows is None and (len(names) > 1 or state.equivalent or core_dtype in SIXTEEN_BIT):
        return None
    dropout = state.dropout if rows is None and layer.training else 0.0
    return names, state.r, core_dtype, dropout, weight.dtype, layer.bias is None, layer.training


def _is_watched(layer: LoRASBLinear) -> bool:
    """True if hooks have to see their own layer run; those that only say which adapters its rows have do not."""
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
class Pending:
    """Results that members have not taken yet."""

    x: Tensor  # the input of all members
    rows: Rows | None  # the adapters of its rows, where they differ by row
    state: tuple[object, ...]  # `FusedGroup._state` at the computation; results are valid while it is unchanged
    results: dict[int, Tensor]  # y [..., out] by the member's index in the group

    def is_for(self, x: Tensor, rows: Rows | None) -> bool:
        """True if it was computed from this very x, and for these adapters of its rows."""
        same = rows is self.rows or (rows is not None and self.rows is not None and rows.same_as(self.rows))
        return x is self.x and same


@dataclass
class Forward:
    """A forward of the parent in progress, in one thread."""

    # The innermost saved-tensor hooks when it began. Gradient checkpointing around some of the layers installs others:
    # a result must not cross into or out of a region that recomputes its layers in backward without the others.
    saving: object
    pending: Pending | None = None  # results that were computed in it


class FusedGroup:
    """Two or more children of one parent, with the same `in_features`, that are expected to read the same x.

    Their results belong to one autograd node: to call backward on them one after another, keep the graph
    (`retain_graph=True`) or separate the layers with `detach(model)`.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        # Weak, as the parent's hooks refer to the group: a cycle would keep a deleted model's memory until the garbage
        # collector runs.
        self._parent: weakref.ref[nn.Module] | None = weakref.ref(parent)
        self._forwards: dict[int, Forward] = {}  # of the parent, by thread: each has its own x
        self._apart: set[int] | None = None  # members to be separated before the next forward
        # Ids, not handles, so that a deepcopied group can remove the copies of its hooks. `always_call` drops the
        # results of a forward that raised, too.
        self._hooks = (
            parent.register_forward_pre_hook(self._parent_begins).id,
            parent.register_forward_hook(self._parent_ends, always_call=True).id,
        )
        for member in self.members:
            member.fused_group = self

    @property
    def members(self) -> list[LoRASBLinear]:
        """The layers that are children of the parent now; a child may have been replaced since."""
        parent = self._parent() if self._parent is not None else None
        children = [parent._modules.get(name) for name in self.names] if parent is not None else []
        return [child for child in children if isinstance(child, LoRASBLinear)]

    def fused_output(self, layer: AdaptedLayer, x: Tensor, rows: Rows | None = None) -> Tensor | None:
        """y of one member, from the pending results or computed with the others'; None: compute it alone."""
        # A compiled graph cannot carry results from one layer to another, and inference tensors have no version.
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        forward = self._forwards.get(threading.get_ident())
        if forward is None or forward.saving != private.saved_tensor_hooks(True):
            return None
        members, pending = self.members, forward.pending
        index = next((i for i, member in enumerate(members) if member is layer), None)
        if index is None:
            return None
        if pending is not None and index in pending.results:
            if pending.is_for(x, rows) and pending.state == self._state(members, x):
                return pending.results.pop(index)
            # This layer got another x, or the state changed: separate those that have not taken their results.
            if self._separate(pending.results, forward):
                return layer.fused_group.fused_output(layer, x, rows) if layer.fused_group is not None else None
            forward.pending = None
            return None
        if pending is not None and pending.is_for(x, rows):
            return None  # differs from the others in rank, dtype, hooks ...: they were computed without it
        forward.pending = None  # results for another x, which the parent called its members with before
        key = group_key(members[index], x, rows)
        if key is None:
            return None
        indices = [i for i, m in enumerate(members) if m is layer or group_key(m, x, rows) == key]
        if len(indices) < 2:
            return None
        results = dict(zip(indices, compute([members[i] for i in indices], x, rows), strict=True))
        y = results.pop(index)
        forward.pending = Pending(x, rows, self._state(members, x), results)
        return y

    def detach(self) -> None:
        """Detach the members and remove the hooks from the parent."""
        self._forwards = {}
        for member in self.members:
            member.fused_group = None
        parent = self._parent() if self._parent is not None else None
        if parent is not None:
            private.remove_forward_hooks(parent, *self._hooks)
        self.names, self._parent = (), None

    @staticmethod
    def _state(members: list[LoRASBLinear], x: Tensor) -> tuple[object, ...]:
        """State that must not change between the first member's call and another's."""
        # Versions show in-place writes to x or R (an optimizer step); results computed on another CUDA stream may not
        # be ready on this one.
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        adapter_states = [
            (*m.active_adapters, m.disable_adapters, *(core._version for core in list(m.lorasb_R.values())))
            for m in members
        ]
        return x._version, torch.is_grad_enabled(), autocast_on(x.device.type), stream, *adapter_states

    def _separate(self, untaken: Collection[int], forward: Forward, ended: bool = False) -> bool:
        """Split the group now; under gradient checkpointing, which will run this forward again, before the next one."""
        if forward.saving is not None:
            self._apart = set(untaken) if self._apart is None else self._apart
            return False
        self._split(untaken, None if ended else forward)
        return True

    def _split(self, untaken: Collection[int], forward: Forward | None) -> None:
        """Separate members that took their results from those that did not; two or more form a new group."""
        parent = self._parent
        groups: tuple[list[str], list[str]] = ([], [])
        for i, name in enumerate(self.names):
            groups[i in untaken].append(name)
        self.detach()
        for names in groups:
            if len(names) > 1 and parent is not None and (module := parent()) is not None:
                group = FusedGroup(module, names)
                if forward is not None:  # the parent's pre-hook has run
                    group._forwards[threading.get_ident()] = Forward(forward.saving)

    def _parent_begins(self, parent: nn.Module, arguments: object) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if self._forwards and thread not in self._forwards:
            # Forwards that threads were interrupted in end with the threads: no hook has run then.
            alive = {one.ident for one in threading.enumerate()}
            for other in [one for one in list(self._forwards) if one not in alive]:  # a copy: threads add theirs
                self._forwards.pop(other, None)
        self._forwards[thread] = forward = Forward(private.saved_tensor_hooks(True))
        # not in backward, where checkpointing repeats a forward, with the groups that it had
        if self._apart is not None and private.graph_task() == -1:
            self._split(self._apart, forward)

    def _parent_ends(self, parent: nn.Module, arguments: object, result: object) -> None:
        """Drop untaken results. `result` is None after an exception: only a complete forward shows who shares x."""
        if torch.compiler.is_compiling():
            return
        forward = self._forwards.pop(threading.get_ident(), None)
        if forward is not None and forward.pending is not None and forward.pending.results and result is not None:
            self._separate(forward.pending.results, forward, ended=True)

    def __deepcopy__(self, memo: dict[int, object]) -> FusedGroup | None:
        """A copy for the copied parent; None if a layer is copied without its parent."""
        parent = memo.get(id(self._parent())) if self._parent is not None else None
        if not isinstance(parent, nn.Module):
            return None
        # Not by __init__: the parent's hook dictionaries are copied as well, under the same ids.
        memo[id(self)] = new = object.__new__(FusedGroup)
        new.names, new._hooks, new._parent = self.names, self._hooks, weakref.ref(parent)
        new._forwards, new._apart = {}, self._apart
        return new

    def __getstate__(self) -> dict[str, object]:
        """An empty group, as weak references do not pickle: unpickled layers are computed alone."""
        return {"names": (), "_hooks": self._hooks, "_parent": None, "_forwards": {}, "_apart": None}


def wanted(group: bool | None) -> bool:
    """Return whether to form groups; None decides by what `benchmarks.kernels.host_time` and `.training.step` show."""
    return torch.cuda.is_available() if group is None else group


def attach(model: nn.Module) -> None:
    """Attach groups to the layers of a model that has none."""
    for parent in model.modules():
        for names in NAMES:
            by_in_features: dict[int, list[str]] = {}  # cross-attention's k and v may read a wider input than its q
            for name in names:
                child = parent._modules.get(name)
                if isinstance(child, LoRASBLinear):
                    by_in_features.setdefault(child.in_features, []).append(name)
            for members in by_in_features.values():
                if len(members) > 1:
                    FusedGroup(parent, members)


def detach(model: nn.Module) -> None:
    """Detach the layers of all groups of a model, which are then computed alone."""
    for module in model.modules():
        group = getattr(module, "fused_group", None)
        if isinstance(group, FusedGroup):
            group.detach()
