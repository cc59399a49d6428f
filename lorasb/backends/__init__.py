"""The backends: `eager`, `cpp` and `triton` compute the ops of `lorasb.ops`, each with the same module names.

Importing this package registers what this machine can run, and imports no triton. A backend uses ops, kernels,
quantization and utils; nothing of layers or above.
"""

from ..ops.registry import backend as backend
from . import cpp, eager, triton

for _each in (eager, cpp, triton):
    _each.register()
