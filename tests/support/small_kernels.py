"""Write small PTX kernels for the interpreter's own tests and run them on arrays, in one or several blocks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernels.ptx.global_memory import GlobalMemory
from benchmarks.kernels.ptx.program import Program
from benchmarks.kernels.ptx.thread_block import ThreadBlock

Array = NDArray[Any]
HEAD = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel({parameters})
.reqntid {threads}
{{
mov.u32 %r0, %tid.x;
"""


def run(
    body: str,
    arrays: Sequence[Array],
    threads: int = 32,
    blocks: int = 1,
    order: Sequence[int] | None = None,
) -> list[Array]:
    """Run a kernel and return its arrays; its body has pointers to them in %rd1, %rd2, ... and the thread in %r0."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 16 kernel_param_{i}" for i in range(len(arrays)))
    loads = "".join(f"ld.param.b64 %rd{i + 1}, [kernel_param_{i}];\n" for i in range(len(arrays)))
    program = Program.parse(HEAD.format(parameters=parameters, threads=threads) + f"{loads}{body}\nret;\n}}\n")
    memory, starts = GlobalMemory(1 << 18), []
    for array in arrays:
        starts.append(memory.allocate(np.ascontiguousarray(array).view(np.uint8).reshape(-1)))
    for i in order if order is not None else range(blocks):
        ThreadBlock(program, memory, 4096, program.placed(starts), i, blocks).run()
    return [
        memory.content(start, array.nbytes).view(array.dtype).reshape(array.shape).copy()
        for start, array in zip(starts, arrays, strict=True)
    ]


def evaluate(opcode: str, *operands: Array, result: Any = None, extra: str = "") -> Array:
    """Execute one arithmetic instruction on the bits of vectors of 32; return the bits of the result."""
    found = np.zeros(32, result or operands[0].dtype)
    lines, names = [], [f"%x{i}" for i in range(len(operands))]
    for i, operand in enumerate(operands):
        lines.append(f"mad.wide.u32 %rd{40 + i}, %r0, {operand.itemsize}, %rd{i + 1};")
        lines.append(f"ld.global.b{8 * operand.itemsize} %x{i}, [%rd{40 + i}];")
    lines.append(f"{opcode} %y, {', '.join([*names, extra] if extra else names)};")
    lines.append(f"mad.wide.u32 %rd60, %r0, {found.itemsize}, %rd{len(operands) + 1};")
    lines.append(f"st.global.b{8 * found.itemsize} [%rd60], %y;")
    return run("\n".join(lines), [*operands, found])[-1]
