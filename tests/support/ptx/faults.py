"""What the interpreter finds wrong with a kernel."""

from __future__ import annotations


class KernelError(Exception):
    """A kernel did what the hardware leaves undefined, or what the interpreter does not know. Names the instruction."""
