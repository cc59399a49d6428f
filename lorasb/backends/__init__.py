"""One registration each. Importing this package registers what this machine can run; it imports no triton."""

from ..ops import backend as backend
from . import eager, eager_gradients, triton, triton_gradients

for _each in (eager, eager_gradients, triton, triton_gradients):
    _each.register()
