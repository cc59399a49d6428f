"""The torch ops: schema, fake and autograd of each, once for all backends, and the backend in force.

`registry` defines and chooses; `linear`, `linear_group`, `linear_quantized` and `weight_gradient` are the ops;
`cpu_fast_path` calls a kernel without the dispatcher. Uses quantization and utils.
"""

from . import linear as linear
from . import linear_group as linear_group
from . import linear_quantized as linear_quantized
from . import weight_gradient as weight_gradient
