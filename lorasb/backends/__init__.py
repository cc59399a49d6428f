"""One registration each. Importing this package registers what this machine can run; it imports no triton."""

from ..ops import backend as backend
from . import eager, triton

eager.register()
triton.register()
