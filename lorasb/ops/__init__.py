"""The torch ops: schema, fake kernel and autograd formula of each, shared by all backends, and the choice of backend.

`registry` defines ops and selects backends; `linear`, `linear_group`, `linear_quantized`, `linear_rows`,
`linear_rows_group` and `weight_gradient` are the ops; `fast_path` and `row_calls` call their kernels without the
dispatcher. Imports quantization and utils.
"""

from . import linear as linear
from . import linear_group as linear_group
from . import linear_quantized as linear_quantized
from . import linear_rows as linear_rows
from . import linear_rows_group as linear_rows_group
from . import weight_gradient as weight_gradient
