"""Forward pre-hooks that gradient checkpointing meets again, when backward computes a part of the forward once more.

transformers hands each module that it checkpoints a function, `_gradient_checkpointing_func(forward, *args)`. While
hooks are installed that function is replaced by one which installs them again where `forward` runs after the block.
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


@contextmanager
def installed(modules: Iterable[nn.Module], hooks: Sequence[Hook]) -> Iterator[None]:
    """Have the hooks in the forwards of this block, and where backward computes parts of these again.

    Args:
        modules: of the whole model.
        hooks: to install.
    """
    inside = True

    def with_hooks(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointing function whose recomputation has the hooks."""

        def call(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
            def again(*given: Any, **named: Any) -> Any:
                """The forward, with the hooks where they are not installed any more."""
                with ExitStack() as stack:
                    if not inside:
                        _register(hooks, stack)
                    return forward(*given, **named)

            return checkpoint(again, *args, **options)

        return call

    with ExitStack() as stack:  # undoes everything, also when a forward raises
        for module in modules:
            checkpoint = vars(module).get(FUNCTION) if module.training else None  # no other mode checkpoints
            if checkpoint is not None:
                setattr(module, FUNCTION, with_hooks(checkpoint))
                stack.callback(setattr, module, FUNCTION, checkpoint)
        _register(hooks, stack)
        try:
            yield
        finally:
            inside = False


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
