"""Forward pre-hooks that gradient checkpointing meets again, when backward computes a part of the forward once more.

transformers hands each module that it checkpoints a function, `_gradient_checkpointing_func(forward, *args)`. While
hooks are installed that function is replaced by one which installs them again where `forward` runs after the block, or
in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

FUNCTION = "_gradient_checkpointing_func"
Hook = tuple[nn.Module, Callable[..., Any]]  # a module, and a forward pre-hook that takes keyword arguments
_lock = threading.Lock()  # over the replacing of functions


class _Block:
    """A block with hooks, which act in the forwards of the thread that entered it."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks, self.thread, self.is_open = hooks, threading.get_ident(), True

    def repeated(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward, with the hooks where they do not act by themselves."""

        def call(*args: Any, **options: Any) -> Any:
            with ExitStack() as stack:
                if not self.is_open or threading.get_ident() != self.thread:
                    _register(self.hooks, stack)
                return forward(*args, **options)

        return call


class _Checkpointing:
    """A module's checkpointing function; what it repeats has the hooks of the block that the thread was in."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.blocks: list[_Block] = []  # of all threads, the innermost last

    def __call__(self, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        thread = threading.get_ident()
        mine = [block for block in list(self.blocks) if block.thread == thread]
        return self.function(mine[-1].repeated(forward) if mine else forward, *args, **options)


@contextmanager
def installed(modules: Iterable[nn.Module], hooks: Sequence[Hook]) -> Iterator[None]:
    """Have the hooks in this thread's forwards of this block, and where backward computes parts of these again.

    Args:
        modules: of the whole model.
        hooks: to install.
    """
    block = _Block(hooks)
    with ExitStack() as stack:  # undoes everything, also when a forward raises
        # no other mode checkpoints
        for module in (one for one in modules if one.training and vars(one).get(FUNCTION) is not None):
            _enter(module, block)
            stack.callback(_leave, module, block)
        _register(hooks, stack)
        try:
            yield
        finally:
            block.is_open = False


def _enter(module: nn.Module, block: _Block) -> None:
    with _lock:
        function = vars(module)[FUNCTION]
        if not isinstance(function, _Checkpointing):
            function = _Checkpointing(function)
            setattr(module, FUNCTION, function)
        function.blocks.append(block)


def _leave(module: nn.Module, block: _Block) -> None:
    """The module has its own function again once the last block is left."""
    with _lock:
        function = vars(module).get(FUNCTION)
        if isinstance(function, _Checkpointing) and block in function.blocks:
            function.blocks.remove(block)
            if not function.blocks:
                setattr(module, FUNCTION, function.function)


def _register(hooks: Sequence[Hook], stack: ExitStack) -> None:
    for module, hook in hooks:
        stack.callback(module.register_forward_pre_hook(_OfThisThread(hook), with_kwargs=True).remove)


class _OfThisThread:
    """A hook for forwards of the thread that makes this: another one has rows of its own, or none."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.owner = hook, threading.get_ident()
        self.names_rows = getattr(hook, "names_rows", False)  # `linear_group` asks

    def __call__(self, *arguments: Any) -> Any:
        # a compiled forward has no other threads, and cannot ask
        mine = torch.compiler.is_compiling() or threading.get_ident() == self.owner
        return self.hook(*arguments) if mine else None
