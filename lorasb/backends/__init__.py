"""One registration each. Importing this package registers what this machine can run; it imports no triton."""

from ..ops import backend as backend
from . import cpp, eager, eager_gradients, eager_quantised, triton, triton_gradients, triton_quantised

for _each in (
    eager,
    eager_gradients,
    eager_quantised,
    cpp,
    triton,
    triton_gradients,
    triton_quantised,
):
    _each.register()
