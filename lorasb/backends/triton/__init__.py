"""The Triton backend: the fused kernels of `lorasb.kernels` on CUDA, or on the CPU under Triton's interpreter.

Importing this package imports no triton: a kernel's first call does.
"""

from pathlib import Path

from ...kernels import plan
from ...utils.cache_dir import cache_dir
from . import linear, linear_quantized, linear_rows, weight_gradient


def register() -> None:
    """Register every op's kernels, and tell the plan where `lorasb bench tune` writes a user's tables."""
    plan.read_user_tables_from(_user_tables)
    for kernels in (linear, linear_quantized, linear_rows, weight_gradient):
        kernels.register()


def _user_tables() -> Path:
    return cache_dir() / "kernels"
