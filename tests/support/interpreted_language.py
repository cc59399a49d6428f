"""Make Triton's interpreter patch triton.language once per launch, not again whenever a kernel calls a @jit function:
the repeats take a quarter of the time of a test with dropout.
"""

from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's function that patches, if this Triton has it."""
    original = getattr(interpreter, "_patch_lang", None)
    replaced: set[str] = set()  # modules patched since the launch began

    def once(function: FunctionType) -> Any:
        """Patch for a function and return the scope that undoes it; a launch's scope is restored at its end."""
        modules = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if replaced and modules <= replaced:
            return None  # a call inside a kernel: its caller drops the scope
        scope = original(function)
        if not replaced:
            restore = scope.restore

            def end() -> None:
                replaced.clear()
                restore()

            scope.restore = end
        replaced.update(modules)
        return scope

    if original is not None:
        interpreter._patch_lang = once
