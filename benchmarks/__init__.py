"""Programs that measure: each prints what it measured and with what. `python -m benchmarks.NAME` from the root."""

import logging

# In the root, whose folder `kernels` is no package, bitsandbytes warns that it cannot import one of that name: a hub's
# kernels, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
