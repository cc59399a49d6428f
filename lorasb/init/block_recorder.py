"""Record a forward through a stack of blocks, so that each block can be recomputed and differentiated separately.

The hooks also verify that the model is a stack: if anything but one tensor passes from block to block, they raise
`NotAStackError`, as the recomputed gradients would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import cast

import torch
from torch import Tensor, nn

from ..constants import PEFT_PREFIX
from ..ops.calls import autocast_on
from .accumulator import version_of
from .task import Layers


class NotAStackError(ValueError):
    """The model is not a plain stack: its blocks do not pass on a single tensor, or share other state."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that are computed one at a time."""

    name: str  # the list's name in the base model
    blocks: list[nn.Module]  # the blocks, from the first to the last
    targets: list[Layers]  # targets of each block, by name

    @property
    def names(self) -> set[str]:
        """Names of all targets inside the blocks."""
        return {name for block in self.targets for name in block}

    @property
    def lowest(self) -> int:
        """Index of the first block that has a target: blocks below it need no gradient."""
        return next(i for i, block in enumerate(self.targets) if block)


def find_stack(model: nn.Module, layers: Layers, name: str | None = None) -> Stack:
    """Return the ModuleList that holds the most target weights, or the one called `name`."""
    # Blocks may contain nested lists (experts), which hold fewer weights than the list of blocks.
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        lists = {n: m for n, m in lists.items() if n == name or n.endswith("." + name)}
        if not lists:
            raise NotAStackError(f"the model has no list of modules {name!r}")
    stacks = [_stack(n, blocks, layers) for n, blocks in lists.items()]
    best = max(stacks, key=_count_weights, default=None)
    if best is None or not best.names:
        raise NotAStackError("no list of modules holds a target layer")
    return best


def _stack(name: str, blocks: nn.ModuleList, layers: Layers) -> Stack:
    """Return the stack for a list of blocks, with each target assigned to the block that contains it."""
    block_indices: dict[nn.Module, list[int]] = {}  # several if blocks share the module
    for i, block in enumerate(blocks):
        for module in block.modules():
            block_indices.setdefault(module, []).append(i)
    targets: list[Layers] = [{} for _ in blocks]
    for layer, module in layers.items():
        indices = block_indices.get(module, [])
        # A shared layer's sum is complete only after all of its blocks.
        if len(indices) > 1:
            raise NotAStackError(f"layer {layer!r} belongs to several blocks")
        for i in indices:
            targets[i][layer] = module
    return Stack(name.removeprefix(PEFT_PREFIX), list(blocks), targets)


def _count_weights(stack: Stack) -> int:
    return sum(m.in_features * m.out_features for block in stack.targets for m in block.values())


HIDDEN = "hidden_states"
MODIFIED_IN_PLACE = "something that passes between blocks is changed in place"
Args = tuple[object, ...]  # positional arguments of a block's forward
Kwargs = dict[str, object]


@dataclass
class Call:
    """A block's stored arguments, and the autocast and random state of the call."""

    hidden: Tensor  # the hidden states
    args: Args  # positional arguments after the hidden states
    kwargs: Kwargs  # keyword arguments without the hidden states
    by_keyword: bool  # True if the hidden states were passed by keyword
    autocast: tuple[str, torch.dtype | None]  # device type, and autocast's dtype or None if it was disabled
    random: list[Tensor]  # random states of the CPU and of the hidden states' GPU, which a block may draw from

    def repeat(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Recompute the block's output (its hidden states) for the same call."""
        back = methodcaller("to", hidden.device)
        args = [_with_tensors(value, back) for value in self.args]
        kwargs = {name: _with_tensors(value, back) for name, value in self.kwargs.items()}
        # Backward runs after the forward's autocast context has ended, so it is entered again.
        kind, dtype = self.autocast
        with _random_restored(self.random, hidden), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            if self.by_keyword:
                return _hidden_of(block(*args, **{HIDDEN: hidden}, **kwargs))
            return _hidden_of(block(hidden, *args, **kwargs))


def _random(hidden: Tensor) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(hidden.device)] if hidden.is_cuda else ())]


@contextmanager
def _random_restored(states: list[Tensor], hidden: Tensor) -> Iterator[None]:
    """Set the random states that `_random` returned; restore the previous ones on exit."""
    with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
        torch.set_rng_state(states[0])
        if hidden.is_cuda:
            torch.cuda.set_rng_state(states[1], hidden.device)
        yield


@dataclass
class Traversal:
    """One forward through the stack."""

    calls: dict[int, Call] = field(default_factory=dict)  # by block index, for blocks not yet differentiated
    # tensors between blocks, from the first block's input to the last one's output. The graph is cut at each of them,
    # so that no graph spans more than one block
    leaves: list[Tensor] = field(default_factory=list)
    # outputs of targets that do not depend on hidden states (a position bias): only their own block may use them
    aside: list[Tensor] = field(default_factory=list)
    # stored copies by the argument's id, so that an argument shared by many blocks (a mask) is stored once
    stored: dict[int, Tensor] = field(default_factory=dict)
    # every tensor that passed between blocks, with its version at that time. The references keep ids from being reused
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    # gradient at the last block's output; later, at the input of the most recently differentiated block
    gradient: Tensor | None = None
    counts: bool = True  # False if its gradients must not be summed

    def watch(self, tensor: Tensor) -> Tensor:
        """Record a tensor's version; returns the tensor."""
        self.versions.append((tensor, version_of(tensor)))
        return tensor


class Recorder:
    """Records every traversal of a stack while the model runs; a backward then ends at the last block's output."""

    def __init__(self, stack: Stack, store: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self.targets = stack.blocks, stack.targets
        self.store = store  # returns a block's input itself, or a copy on the host
        self.traversals: list[Traversal] = []  # finished, in order
        self.above = False  # True while modules after the last block run
        self._running: int | None = None  # index of the block whose forward is running
        self._open: list[Traversal] = []  # traversals since the last backward
        self._passive = False  # a forward under no_grad, which a loss_fn may run: not recorded

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Register hooks on blocks and targets, and remove them on exit."""
        with ExitStack() as handles:
            for i, block in enumerate(self.blocks):
                # Must run before FSDP2's pre-forward hook, which replaces the inputs with cast or wrapped ones: the
                # identity of the hidden states is checked below.
                before = partial(self._before, i)
                handles.enter_context(block.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                handles.enter_context(block.register_forward_hook(partial(self._after, i)))
                for name, layer in self.targets[i].items():
                    handles.enter_context(layer.register_forward_pre_hook(partial(self._inside, i, name)))
                    handles.enter_context(layer.register_forward_hook(self._aside))
            yield

    def settle(self, counts: bool) -> None:
        """Check the traversals after a backward, and record those with a gradient at the last block's output."""
        for traversal in self._open:
            complete = len(traversal.leaves) > len(self.blocks)
            if not complete and any(leaf.grad is not None for leaf in traversal.leaves):
                raise NotAStackError("a forward leaves the stack before its last block")
            # Recomputation would see different values; autograd's own check covers only what it saved for backward.
            if any(version_of(tensor) != version for tensor, version in traversal.versions):
                raise NotAStackError(MODIFIED_IN_PLACE)
            if any(leaf.grad is not None for leaf in (*traversal.leaves[:-1], *traversal.aside)):
                raise NotAStackError("the loss depends on the hidden states between blocks too")
            traversal.gradient = traversal.leaves[-1].grad if complete else None
            traversal.counts = counts
            # needed for the checks only
            traversal.leaves, traversal.aside, traversal.stored, traversal.versions = [], [], {}, []
            if traversal.gradient is not None:
                self.traversals.append(traversal)
        self.above, self._open = False, []

    def _before(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if i == 0:
            self._passive, self.above = not torch.is_grad_enabled(), False
        if self._passive:
            return None
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise NotAStackError(f"the first input of block {i} is no tensor of hidden states")
        self._running = i
        if i == 0:
            # A recurrent stack: the gradient at the top of the first traversal would come from the second one.
            if _depends_on(hidden, self._leaves()):
                raise NotAStackError("block 0 runs more than once in a forward, on its own results")
            # Cut the graph: embeddings below need no gradient, and `settle` detects gradients that reach this leaf.
            leaf = hidden.detach().requires_grad_(True)
            self._open.append(Traversal(leaves=[leaf]))
            self._store_call(self._open[-1].watch(leaf), args, kwargs)
            return ((leaf, *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: leaf})
        traversal = self._open[-1] if self._open else Traversal()
        if len(traversal.calls) != i:
            raise NotAStackError(f"block {i} runs after block {len(traversal.calls) - 1}, or more than once")
        # Compare identities: an operation between blocks makes a new tensor, and recomputation would not repeat it.
        if hidden is not traversal.leaves[-1]:
            raise NotAStackError(f"the input of block {i} is not the output of the block before")
        self._store_call(hidden, args, kwargs)
        return None

    def _inside(self, i: int, name: str, module: nn.Module, args: Args) -> None:
        # The layer's sum would lack the gradient of the call outside.
        if torch.is_grad_enabled() and self._running != i:
            raise NotAStackError(f"layer {name!r} also runs outside of its block")

    def _aside(self, module: nn.Module, args: Args, output: object) -> Tensor | None:
        """Put a target's output into the graph, so that its use by a later block or by the loss is detected."""
        recorded = self._open and not self._passive and self._running is not None and torch.is_grad_enabled()
        if not recorded or not isinstance(output, Tensor) or output.requires_grad:
            return None
        leaf = output.detach().requires_grad_(True)
        self._open[-1].aside.append(leaf)
        return leaf.clone()  # a leaf may not be changed in place

    def _store_call(self, hidden: Tensor, args: Args, kwargs: Kwargs) -> None:
        """Store a block's input and its other arguments; only the input may depend on earlier blocks."""
        traversal, leaves = self._open[-1], self._leaves()
        block = len(traversal.calls)

        def store_once(tensor: Tensor) -> Tensor:
            """Store a tensor, unless an earlier block of this traversal received it too."""
            if _depends_on(tensor, leaves):
                raise NotAStackError(f"block {block} takes more from the blocks before than their hidden states")
            if id(tensor) not in traversal.stored:
                traversal.stored[id(tensor)] = self.store(traversal.watch(tensor).detach())
            return traversal.stored[id(tensor)]

        positional = tuple(_with_tensors(value, store_once) for value in args[1:])
        named = {n: _with_tensors(value, store_once) for n, value in kwargs.items() if args or n != HIDDEN}
        kind = hidden.device.type
        autocast = kind, torch.get_autocast_dtype(kind) if autocast_on(kind) else None
        given = self.store(hidden.detach()), positional, named, not args
        traversal.calls[block] = Call(*given, autocast, _random(hidden))

    def _after(self, i: int, module: nn.Module, args: Args, output: object) -> object:
        if self._passive:
            return None
        # Detaching frees this block's graph at once; backward will recompute it.
        leaf = _hidden_of(output).detach().requires_grad_(True)
        self._running = None
        self._open[-1].leaves.append(self._open[-1].watch(leaf))
        # The head and targets above the stack are summed by `GradientSums` from here on.
        self.above = i == len(self.blocks) - 1
        return _tuple_like(output, (leaf, *output[1:])) if isinstance(output, tuple) else leaf

    def _leaves(self) -> set[int]:
        return {id(leaf) for traversal in self._open for leaf in (*traversal.leaves, *traversal.aside)}


def _depends_on(tensor: Tensor, leaves: set[int]) -> bool:
    """Return True if a tensor was computed from a leaf whose id is in `leaves`."""
    # Walks the graph without recursion. The nodes of leaves are `AccumulateGrad`, which have a `variable`.
    stack, seen = [tensor.grad_fn], set()
    while stack and id(tensor) not in leaves:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            tensor = getattr(node, "variable", tensor)
            stack += [source for source, _ in node.next_functions]
    return id(tensor) in leaves


def _hidden_of(output: object) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise NotAStackError(f"expected a block to return its hidden states, got {type(output).__name__}")
    return hidden


def _with_tensors(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """Return an argument with `change` applied to its tensors, also inside tuples, so that it can be passed again."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return _tuple_like(value, [_with_tensors(item, change) for item in value])
    held = getattr(value, "__dict__", {}).values()  # e.g. a context object that blocks write results into
    depends = any(isinstance(one, Tensor) and one.requires_grad for one in held)
    if isinstance(value, MutableMapping | MutableSequence) or "Cache" in type(value).__name__ or depends:
        raise NotAStackError(f"blocks share a {type(value).__name__} that they may write to")
    return value


def _tuple_like(value: tuple[object, ...], items: Sequence[object]) -> tuple[object, ...]:
    """Return `items` as a tuple of the same type as `value`, which may be a named tuple."""
    return cast("tuple[object, ...]", getattr(value, "_make", tuple)(items))
