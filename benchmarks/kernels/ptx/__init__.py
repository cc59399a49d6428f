"""An interpreter of compiled kernels: it executes Triton's PTX on the CPU and checks every access.

The threads of a program run in lockstep as numpy vectors; programs run one after another, in any order. For what
is checked and what is not, see docs/kernels-without-a-gpu.md. The tests are in tests/ptx.

- `program` parses PTX. `formats` has its types and roundings, `arithmetic` what each instruction computes.
- `global_memory` and `shared_memory` hold bytes and check accesses.
- `tensor_cores` has mma, ldmatrix, stmatrix and wgmma; `tensor_copies` has TMA and mbarriers.
- `thread_block` runs one program, `launch` a grid of them over tensors.
- `work` counts the work of a launch of any size from a few of its programs.
- `plugin` lets the kernel tests run on it: `pytest --ptx sm_86`.
"""

from .launch import execute
from .program import KernelError

__all__ = ["KernelError", "execute"]
