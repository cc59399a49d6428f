"""A model as a stack of blocks: which list of modules it is, and every block's input and arguments in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..lookup import PEFT_PREFIX

HIDDEN = "hidden_states"


class NotAStackError(ValueError):
    """The model does not pass one tensor from block to block, or something else passes between them."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks, its name in the model, and the targets of each block by name."""

    name: str
    blocks: list[nn.Module]
    targets: list[dict[str, nn.Module]]

    @property
    def names(self) -> set[str]:
        """All targets inside."""
        return {name for block in self.targets for name in block}

    @property
    def lowest(self) -> int:
        """The first block that has a target: what lies below needs no gradient."""
        return next(i for i, block in enumerate(self.targets) if block)


def find_stack(model: nn.Module, layers: Mapping[str, nn.Module], name: str | None = None) -> Stack:
    """The list of modules that holds most of the targets' weights, or the one of that name.

    Raises:
        NotAStackError: none, none of that name, or one without a target.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        lists = {n: m for n, m in lists.items() if n == name or n.endswith("." + name)}
        if not lists:
            raise NotAStackError(f"the model has no list of modules {name!r}")
    found = [_stack(n, blocks, layers) for n, blocks in lists.items()]
    best = max(found, key=_weights, default=None)
    if best is None or not best.names:
        raise NotAStackError("no list of modules holds a target layer")
    return best


def _stack(name: str, blocks: nn.ModuleList, layers: Mapping[str, nn.Module]) -> Stack:
    homes = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
    targets: list[dict[str, nn.Module]] = [{} for _ in blocks]
    for layer, module in layers.items():
        if id(module) in homes:
            targets[homes[id(module)]][layer] = module
    return Stack(name.removeprefix(PEFT_PREFIX), list(blocks), targets)


def _weights(stack: Stack) -> int:
    return sum(m.in_features * m.out_features for block in stack.targets for m in block.values())  # type: ignore[operator, misc]


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
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            if self.by_keyword:
                return _hidden_of(block(*self.args, **{HIDDEN: hidden}, **self.kwargs))
            return _hidden_of(block(hidden, *self.args, **self.kwargs))


@dataclass
class Traversal:
    """One forward through the stack: every block's input and call, and the gradient at the last one's output."""

    hidden: list[Tensor | None] = field(default_factory=list)
    calls: list[Call | None] = field(default_factory=list)
    output: Tensor | None = None
    gradient: Tensor | None = None
    first_half: bool = False
    counts: bool = True
    extras: list[Tensor] = field(default_factory=list)  # what blocks return beside hidden states
    leaves: list[Tensor] = field(default_factory=list)

    def release(self, block: int) -> None:
        """Forget a block's input and call."""
        self.hidden[block] = self.calls[block] = None


class Recorder:
    """Records every traversal of a stack while the model runs: no graph inside the stack, and one above it.

    Args:
        blocks: of the stack.
        keep: what becomes of a boundary: itself, or a copy on the host.
    """

    def __init__(self, blocks: list[nn.Module], keep: Callable[[Tensor], Tensor]) -> None:
        self.blocks, self.keep = blocks, keep
        self.traversals: list[Traversal] = []
        self.above = False  # the stack is behind us and a graph is being made
        self._passive = False  # the caller wants no gradient of this forward: it is not ours
        self._version = 0

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Hooks on the blocks, inside the block only."""
        handles: list[Any] = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._before(i), with_kwargs=True))
            handles.append(block.register_forward_hook(self._after(i)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def unfinished(self) -> bool:
        """Whether the last forward did not come to the last block."""
        return bool(self.traversals) and len(self.traversals[-1].calls) < len(self.blocks)

    def settle(self, first_half: bool, counts: bool) -> None:
        """After a backward: take the gradients at the top, and drop forwards that had none.

        Raises:
            NotAStackError: the loss also depends on what lies between blocks.
        """
        kept = []
        for traversal in self.traversals:
            if traversal.gradient is None and traversal.output is not None:
                traversal.gradient = traversal.output.grad
                if any(leaf.grad is not None for leaf in traversal.leaves):
                    raise NotAStackError("the loss depends on the hidden states between blocks too")
                traversal.leaves, traversal.extras, traversal.output = [], [], None
                traversal.first_half, traversal.counts = first_half, counts
            if traversal.gradient is not None:
                kept.append(traversal)
        self.traversals = kept

    def _before(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i == 0:
                self._passive = not torch.is_grad_enabled()
                self.above = False
            if self._passive:
                return
            if i == 0:
                self.traversals.append(Traversal())
                torch.set_grad_enabled(False)  # nothing in the stack needs a graph: it is recomputed block by block
            traversal = self.traversals[-1] if self.traversals else Traversal()
            if len(traversal.calls) != i:
                raise NotAStackError(f"block {i} runs after block {len(traversal.calls) - 1}, or more than once")
            hidden = args[0] if args else kwargs.get(HIDDEN)
            if not isinstance(hidden, Tensor) or (i > 0 and hidden is not traversal.leaves[-1]):
                raise NotAStackError(f"the input of block {i} is not the output of the block before")
            rest = {name: value for name, value in kwargs.items() if args or name != HIDDEN}
            produced = {id(extra) for extra in traversal.extras}
            if any(id(t) in produced for value in (*args[1:], *rest.values()) for t in _tensors(value)):
                raise NotAStackError(f"block {i} takes more from the blocks before than their hidden states")
            kept = {name: _settled(value) for name, value in rest.items()}
            call = Call(tuple(_settled(value) for value in args[1:]), kept, not args, _autocast(hidden))
            self._version = hidden._version
            traversal.hidden.append(self.keep(hidden.detach()))
            traversal.calls.append(call)

        return hook

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._passive:
                return None
            traversal = self.traversals[-1]
            hidden = _hidden_of(output)
            source = args[0] if args else (traversal.leaves[-1] if traversal.leaves else None)
            if source is not None and source._version != self._version:
                raise NotAStackError(f"block {i} changes its input in place")
            leaf = hidden.detach().requires_grad_(True)
            if i == len(self.blocks) - 1:
                torch.set_grad_enabled(True)
                self.above, traversal.output = True, leaf
            else:
                traversal.leaves.append(leaf)
            if not isinstance(output, tuple):
                return leaf
            traversal.extras.extend(t for value in output[1:] for t in _tensors(value))
            return (leaf, *output[1:])

        return hook


def _hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise NotAStackError(f"expected a block to return its hidden states, got {type(output).__name__}")
    return hidden


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _settled(value: Any) -> Any:
    """An argument as it can be given again: tensors without a graph, nothing that blocks write to."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_settled(item) for item in value)
    if isinstance(value, dict | list) or "Cache" in type(value).__name__:
        raise NotAStackError(f"blocks share a {type(value).__name__} that they may write to")
    return value


def _autocast(hidden: Tensor) -> tuple[str, torch.dtype | None]:
    kind = hidden.device.type
    return kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
