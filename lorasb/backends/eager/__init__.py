"""The eager backend: every op composed of torch's own, for any device and dtype. `auto` falls back to it."""

from . import linear, linear_quantized, linear_rows, weight_gradient


def register() -> None:
    """Register every op's kernels."""
    for kernels in (linear, linear_quantized, linear_rows, weight_gradient):
        kernels.register()
