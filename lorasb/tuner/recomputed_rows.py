"""Forward pre-hooks that gradient checkpointing meets again, when backward computes a part of the forward once more.

transformers hands each module that it checkpoints a function, `_gradient_checkpointing_func(forward, *args)`. While
hooks are installed that function is replaced by one which installs them again where `forward` runs after the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

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
            checkpoint = vars(module).get(FUNCTION)
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
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
