"""Small kernels in PTX for the interpreter's own tests: written out, given arrays, run on one or several blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.global_memory import GlobalMemory
from ptx.program import Program
from ptx.thread_block import Place, ThreadBlock

Array = NDArray[Any]
HEAD = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel({parameters})
.reqntid {threads}
{{
"""


def assemble(body: str, pointers: int, threads: int = 32) -> Program:
    """A kernel with so many pointers, which are in %rd1, %rd2, ... when the body begins; %r0 is the thread."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 16 kernel_param_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.b64 %rd{i + 1}, [kernel_param_{i}];\n" for i in range(pointers))
    return Program.parse(
        HEAD.format(parameters=parameters, threads=threads) + f"mov.u32 %r0, %tid.x;\n{loads}{body}\nret;\n}}\n"
    )


def run(
    program: Program,
    arrays: Sequence[Array],
    blocks: int = 1,
    order: Sequence[int] | None = None,
    shared: int = 4096,
    fresh: Sequence[int] = (),
) -> list[Array]:
    """The arrays after the kernel has run; those at the places `fresh` count as not written before."""
    memory = GlobalMemory(1 << 18)
    starts = []
    for i, array in enumerate(arrays):
        content = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        starts.append(memory.allocate(content, np.zeros(len(content), bool) if i in fresh else None))
    values = {parameter.name: start for parameter, start in zip(program.parameters, starts, strict=True)}
    for i in order if order is not None else range(blocks):
        ThreadBlock(program, memory, shared, values, Place(i, blocks)).run()
    return [
        memory.content(start, array.nbytes).view(array.dtype).reshape(array.shape).copy()
        for start, array in zip(starts, arrays, strict=True)
    ]


def evaluate(opcode: str, *operands: Array, result: Any = None, extra: str = "") -> Array:
    """One arithmetic instruction on vectors of 32: the operands' bits go in, the result's come out."""
    dtype = np.dtype(result or operands[0].dtype)
    lines = []
    for i, operand in enumerate(operands):
        size = operand.dtype.itemsize
        lines.append(f"mad.wide.u32 %rd{40 + i}, %r0, {size}, %rd{i + 1};")
        lines.append(f"ld.global.b{8 * size} %x{i}, [%rd{40 + i}];")
    names = [f"%x{i}" for i in range(len(operands))]
    if extra:
        names.append(extra)
    size = dtype.itemsize
    lines.append(f"{opcode} %y, {', '.join(names)};")
    lines.append(f"mad.wide.u32 %rd60, %r0, {size}, %rd{len(operands) + 1};")
    lines.append(f"st.global.b{8 * size} [%rd60], %y;")
    program = assemble("\n".join(lines), len(operands) + 1)
    return run(program, [*operands, np.zeros(32, dtype)])[-1]
