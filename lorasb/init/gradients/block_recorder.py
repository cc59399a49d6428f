"""Records of a forward through a stack of blocks: every block's input and arguments, and the gradient at the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .block_stack import NotAStackError, Stack

HIDDEN = "hidden_states"
DISTURBED = "something that passes between blocks is changed in place"
UNCHANGING = -1
LEFT = "a forward leaves the stack before its last block"


@dataclass
class Call:
    """What a block got beside its hidden states, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    autocast: tuple[str, torch.dtype | None]

    def repeat(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for the same call."""
        kind, dtype = self.autocast
        args = tuple(_moved(value, hidden.device) for value in self.args)
        kwargs = {name: _moved(value, hidden.device) for name, value in self.kwargs.items()}
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            if self.by_keyword:
                return _hidden_of(block(*args, **{HIDDEN: hidden}, **kwargs))
            return _hidden_of(block(hidden, *args, **kwargs))


@dataclass
class Traversal:
    """One forward through the stack: every block's input and call, and the gradient at the last one's output.

    `leaves` are the tensors that pass between blocks, from the first one's input to the last one's output: the graph
    is cut at each, so that a block's graph goes when the block is done.
    """

    hidden: list[Tensor | None] = field(default_factory=list)
    calls: list[Call | None] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)  # arguments that blocks share, kept once
    watched: list[tuple[Tensor, int]] = field(default_factory=list)  # what passed, and its version then
    gradient: Tensor | None = None
    first_half: bool = False
    counts: bool = True

    def pass_on(self, tensor: Tensor) -> Tensor:
        """Watch a tensor from now on, and hold it; inference tensors have no version, as nobody may change them."""
        self.watched.append((tensor, UNCHANGING if tensor.is_inference() else tensor._version))
        return tensor

    @property
    def disturbed(self) -> bool:
        """Whether something that passed was changed in place since."""
        return any(version != UNCHANGING and tensor._version != version for tensor, version in self.watched)

    def release(self, block: int) -> None:
        """Forget a block's input and call."""
        self.hidden[block] = self.calls[block] = None


class Recorder:
    """Records every traversal of a stack while the model runs, with a graph from the last block's output on.

    Gradients that come to anything but that output (a loss on hidden states, a router's own loss, another traversal)
    show that the model is no plain stack.

    Args:
        stack: the blocks and their targets.
        keep: what becomes of a boundary or an argument: itself, or a copy on the host.
    """

    def __init__(self, stack: Stack, keep: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self.targets, self.keep = stack.blocks, stack.targets, keep
        self._running: int | None = None
        self.traversals: list[Traversal] = []
        self.above = False  # the stack is behind us
        self._open: list[Traversal] = []  # of the forwards since the last backward
        self._passive = False  # the caller wants no gradient of this forward: it is not ours

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Hooks on the blocks, inside the block only."""
        handles: list[Any] = []
        for i, block in enumerate(self.blocks):
            # before the hooks of FSDP2, which hand on other tensors than came
            handles.append(block.register_forward_pre_hook(self._before(i), prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(self._after(i)))
            for name, layer in self.targets[i].items():
                handles.append(layer.register_forward_pre_hook(self._inside(i, name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def unfinished(self) -> bool:
        """Whether the last forward did not come to the last block."""
        return bool(self._open) and len(self._open[-1].leaves) <= len(self.blocks)

    def begin(self) -> None:
        """Before a forward."""
        self.above, self._open = False, []

    def settle(self, first_half: bool, counts: bool) -> None:
        """After a backward: keep forwards with a gradient at the top, and drop those that had none.

        Raises:
            NotAStackError: the loss also depends on what lies between blocks.
        """
        for traversal in self._open:
            complete = len(traversal.leaves) > len(self.blocks)
            if not complete and any(leaf.grad is not None for leaf in traversal.leaves):
                raise NotAStackError(LEFT)
            if traversal.disturbed:
                raise NotAStackError(DISTURBED)
            if any(leaf.grad is not None for leaf in traversal.leaves[:-1]):
                raise NotAStackError("the loss depends on the hidden states between blocks too")
            traversal.gradient = traversal.leaves[-1].grad if complete else None
            traversal.first_half, traversal.counts = first_half, counts
            traversal.leaves, traversal.kept, traversal.watched = [], {}, []
        self.traversals += [traversal for traversal in self._open if traversal.gradient is not None]
        self.begin()

    def _before(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if i == 0:
                self._passive, self.above = not torch.is_grad_enabled(), False
            if self._passive:
                return None
            hidden = args[0] if args else kwargs.get(HIDDEN)
            if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
                raise NotAStackError(f"the first input of block {i} is no tensor of hidden states")
            self._running = i
            if i == 0:
                return self._enter(hidden, args, kwargs)
            traversal = self._open[-1] if self._open else Traversal()
            if len(traversal.calls) != i:
                raise NotAStackError(f"block {i} runs after block {len(traversal.calls) - 1}, or more than once")
            if hidden is not traversal.leaves[-1]:
                raise NotAStackError(f"the input of block {i} is not the output of the block before")
            self._keep(traversal, hidden, args, kwargs)
            return None

        return hook

    def _inside(self, i: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and self._running != i:
                raise NotAStackError(f"layer {name!r} also runs outside of its block")

        return hook

    def _enter(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new traversal, whose first input is a leaf."""
        if _depends_on(hidden, self._leaves()):
            raise NotAStackError("block 0 runs more than once in a forward, on its own results")
        leaf = hidden.detach().requires_grad_(True)
        self._open.append(Traversal(leaves=[leaf]))
        self._open[-1].pass_on(leaf)
        self._keep(self._open[-1], leaf, args, kwargs)
        return ((leaf, *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: leaf})

    def _keep(self, traversal: Traversal, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if args or name != HIDDEN}
        leaves, block = self._leaves(), len(traversal.calls)
        if any(_depends_on(t, leaves) for value in (*args[1:], *rest.values()) for t in _tensors(value)):
            raise NotAStackError(f"block {block} takes more from the blocks before than their hidden states")

        def kept(tensor: Tensor) -> Tensor:
            """The tensor as it is kept, once for all blocks that get it."""
            if id(tensor) not in traversal.kept:
                traversal.kept[id(tensor)] = self.keep(traversal.pass_on(tensor).detach())
            return traversal.kept[id(tensor)]

        named = {name: _settled(value, kept) for name, value in rest.items()}
        call = Call(tuple(_settled(value, kept) for value in args[1:]), named, not args, _autocast(hidden))
        traversal.hidden.append(self.keep(hidden.detach()))
        traversal.calls.append(call)

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._passive:
                return None
            leaf = _hidden_of(output).detach().requires_grad_(True)
            self._running = None
            self._open[-1].leaves.append(self._open[-1].pass_on(leaf))
            self.above = i == len(self.blocks) - 1
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        return hook

    def _leaves(self) -> set[int]:
        return {id(leaf) for traversal in self._open for leaf in traversal.leaves}


def _depends_on(tensor: Tensor, leaves: set[int]) -> bool:
    """Whether a tensor was computed from one of these leaves."""
    if id(tensor) in leaves or not tensor.requires_grad:
        return id(tensor) in leaves
    found, seen = [tensor.grad_fn], set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            return True
        found += [source for source, _ in node.next_functions]
    return False


def _hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise NotAStackError(f"expected a block to return its hidden states, got {type(output).__name__}")
    return hidden


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _settled(value: Any, kept: Callable[[Tensor], Tensor]) -> Any:
    """An argument as it can be given again: tensors without a graph, nothing that blocks write to."""
    if isinstance(value, Tensor):
        return kept(value)
    if isinstance(value, tuple):
        return tuple(_settled(item, kept) for item in value)
    if isinstance(value, dict | list) or "Cache" in type(value).__name__:
        raise NotAStackError(f"blocks share a {type(value).__name__} that they may write to")
    return value


def _moved(value: Any, device: torch.device) -> Any:
    """An argument where its block computes."""
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(item, device) for item in value) if isinstance(value, tuple) else value


def _autocast(hidden: Tensor) -> tuple[str, torch.dtype | None]:
    kind = hidden.device.type
    return kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
