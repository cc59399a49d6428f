"""The torch ops: schema, fake kernel and autograd formula, shared by all backends, and the choice of backend.

`adapted_linear` is the op of all layers, `plain_ops` are those without a derivative; `registry` defines ops and selects
backends. `composed` computes the same by torch's own operations. Imports compat and utils.
"""

from . import adapted_linear as adapted_linear
from . import plain_ops as plain_ops
