"""Benchmarks: each prints its measurements and their environment. Run `python -m benchmarks.NAME` from the root."""

import logging

# bitsandbytes tries to import Hugging Face's package `kernels`, finds the folder `kernels` of this root instead, and
# warns. Nothing here uses that package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
