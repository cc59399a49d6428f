"""Instructions other than arithmetic: moves, memory, copies, barriers, shuffles and matrices, by opcode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic, formats, tensor_copies, tensor_cores
from .formats import BITS, Array
from .program import Instruction, KernelError, Operand, members

if TYPE_CHECKING:
    from .thread_block import ThreadBlock

WARP, WARPGROUP = 32, 128


def _move(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """mov: also splits a register into {halves}, or joins one from them."""
    target, source = instruction.operands
    dtype = block.dtype_of(instruction)
    half = BITS[np.dtype(dtype).itemsize // max(len(members(target)), len(members(source)))]
    if isinstance(target, tuple):
        halves = np.ascontiguousarray(block.get(source, dtype)).view(half).reshape(block.threads, -1)
        block.put_all(members(target), halves, active)
    elif isinstance(source, tuple):
        joined = np.stack([block.packed(name, half) for name in source], 1).view(dtype)
        block.put(target, joined[:, 0], active)
    else:
        block.put(target, block.get(source, dtype), active)


def _convert(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    target, *sources = instruction.operands
    kind = ".".join(instruction.parts[1:])
    if kind in ("rn.bf16x2.f32", "rn.f16x2.f32"):
        one = formats.to_bf16 if "bf16" in kind else formats.to_f16
        high, low = (one(block.get(source, np.float32)).astype(np.uint32) for source in sources)
        block.put(target, (high << np.uint32(16)) | low, active)
        return
    result = arithmetic.convert(instruction.parts, lambda dtype: block.get(sources[0], dtype))
    if result is None:
        raise instruction.unknown()
    block.put(target, result, active)


def _load(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """ld: from a parameter, shared memory or global memory; one to four values."""
    target, source = instruction.operands
    dtype, targets, threads = block.dtype_of(instruction), members(target), block.chosen(active)
    if instruction.parts[1] == "param":
        block.put(target, _parameter(block, source, dtype), active)
        return
    memory, width = block.memory_of(instruction)
    addresses = block.addresses(source, width, threads)
    values = np.zeros((block.threads, len(targets)), dtype)
    values[threads] = memory.read(addresses, values[0].nbytes, block.warps[threads], dtype)
    block.put_all(targets, values, active)


def _parameter(block: ThreadBlock, source: Any, dtype: Any) -> Array:
    """A kernel parameter's value, by name or by its place among the parameters."""
    places = block.addresses(source, np.uint64, block.lanes)
    result = np.zeros(block.threads, dtype)
    for place in np.unique(places).tolist():
        if place not in block.values:
            raise KernelError("ld.param between parameters")
        value = block.values[place]
        bits = np.float32(value).view(np.uint32) if isinstance(value, float) else np.uint64(value % 2**64)
        result[places == place] = np.asarray(bits).astype(BITS[np.dtype(dtype).itemsize]).view(dtype)
    return result


def _store(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """st: to shared or global memory; one to four values."""
    target, source = instruction.operands
    threads = block.chosen(active)
    values = block.get_all(members(source), block.dtype_of(instruction))
    memory, width = block.memory_of(instruction)
    addresses = block.addresses(target, width, threads)
    memory.write(addresses, values[threads], values[0].nbytes, block.warps[threads])


def _atomic(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """atom.global.gpu.ORDER.add.u32: acq_rel orders programs, relaxed does not."""
    if instruction.opcode not in ("atom.global.gpu.acq_rel.add.u32", "atom.global.gpu.relaxed.add.u32"):
        raise instruction.unknown()
    target, address, value = instruction.operands
    threads = block.chosen(active)
    former, values = np.zeros(block.threads, np.uint32), block.get(value, np.uint32)[threads]
    addresses, ordered = block.addresses(address, np.uint64, threads), "acq_rel" in instruction.parts
    former[threads] = block.memory.atomic_add(addresses, values, ordered)
    block.put(target, former, active)


def _barrier(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """bar.sync and barrier.sync of all threads; bar.warp.sync orders lanes, which are in lockstep here."""
    if "warp" in instruction.parts:
        return
    block.all_threads(active)
    block.shared.clock += 1


def _copy(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """cp.async: global to shared, and its groups. A source size of 0 writes zeros."""
    kind = instruction.parts[2]
    if kind == "bulk":
        tensor_copies.copy(block, instruction, active)
        return
    if kind == "commit_group":
        block.shared.copies.commit()
        return
    if kind in ("wait_group", "wait_all"):
        pending = instruction.number() if kind == "wait_group" else 0
        block.shared.arrive(block.shared.copies.wait(pending))
        return
    target, source, _, *given = instruction.operands
    size, threads = instruction.number(2), block.chosen(active)
    taken = block.get(given[0], np.uint32)[threads] if given else np.full(len(threads), size, np.uint32)
    if not ((taken == size) | (taken == 0)).all():
        raise KernelError("cp.async of a part of its bytes is not supported")
    words = np.zeros((len(threads), size // 4), np.uint32)
    reading = threads[taken == size]
    if len(reading):
        addresses = block.addresses(source, np.uint64, reading)
        words[taken == size] = block.memory.read(addresses, size, block.warps[reading], np.uint32)
    block.shared.start_copy(block.addresses(target, np.uint32, threads), words, size, block.warps[threads])


def _fence(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """fence.proxy.async makes writes visible to wgmma and copies; other fences order what is always in order here."""
    if instruction.parts[1:3] == ("proxy", "async"):
        block.shared.fences += 1


def _grid_dependency(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """griddepcontrol.wait for the previous launch; launch_dependents has no effect, as launches run in turn here."""
    block.all_threads(active)
    if instruction.parts[1] == "wait":
        block.memory.waited.add(block.number)


def _shuffle(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """shfl.sync over whole warps."""
    block.whole_warps(active)
    target, source, by, clamp = instruction.operands[:4]
    bounds = block.get(clamp, np.uint32)
    if ((bounds & np.uint32(0x1F1F)) != 31).any() and (bounds != 0).any():
        raise KernelError("shfl over parts of a warp is not supported")
    lane, step = block.lanes % WARP, block.get(by, np.uint32).astype(np.int64)
    lanes = {
        "idx": step % WARP,
        "bfly": lane ^ step,
        "down": np.where(lane + step < WARP, lane + step, lane),
        "up": np.where(lane >= step, lane - step, lane),
    }[instruction.parts[2]]
    value = block.get(source, np.uint32)
    block.put(str(target).split("|")[0], value[block.lanes // WARP * WARP + lanes], active)


def _warp_rows(block: ThreadBlock, operand: Operand, count: int) -> tuple[Array, Array]:
    """The addresses of 8·count rows that the lanes of each warp give, and their warps."""
    threads = block.lanes.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
    return block.addresses(operand, np.uint32, threads), block.warps[threads]


def _load_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """ldmatrix.m8n8.x1, .x2, .x4 of b16, also transposed."""
    block.all_threads(active)
    targets = members(instruction.operands[0])
    rows, warps = _warp_rows(block, instruction.operands[1], len(targets))
    matrices = block.shared.read(rows, 16, warps, np.uint16).reshape(-1, len(targets), 8, 8)
    registers = tensor_cores.from_rows(matrices, "trans" in instruction.parts)
    block.put_all(targets, registers.reshape(block.threads, -1))


def _store_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """stmatrix."""
    block.all_threads(active)
    sources = members(instruction.operands[1])
    rows, warps = _warp_rows(block, instruction.operands[0], len(sources))
    registers = _by_warps(block.get_all(sources, np.uint32))
    halves = tensor_cores.to_rows(registers, "trans" in instruction.parts).reshape(-1, 8)
    block.shared.write(rows, halves, 16, warps)


def _by_warps(registers: Array) -> Array:
    """[threads, n] as [W, 32 lanes, n]."""
    return registers.reshape(-1, WARP, registers.shape[1])


def _multiply_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """mma.sync.aligned.SHAPE.row.col.f32.A.B.f32."""
    block.all_threads(active)
    parts = instruction.parts
    if parts[4:7] != ("row", "col", "f32") or parts[-1] != "f32":
        raise instruction.unknown()
    targets, *sources = map(members, instruction.operands)
    a, b, c = (
        _by_warps(block.get_all(names, kind))
        for names, kind in zip(sources, (np.uint32, np.uint32, np.float32), strict=True)
    )
    result = tensor_cores.mma(parts[3], (parts[7], parts[8]), a, b, c)
    block.put_all(targets, result.reshape(block.threads, -1))


def _multiply_warpgroups(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """wgmma: its fence and groups, and mma_async.sync.aligned.mMnNkK.f32.A.B over groups of four warps."""
    kind = instruction.parts[1]
    if kind == "commit_group":
        block.shared.products.commit()
        block.fragments.commit()
    elif kind == "wait_group":
        block.shared.wait_for_readers(block.shared.products, instruction.number())
        block.fragments.wait(instruction.number())
    elif kind == "mma_async":
        block.all_threads(active)
        _start_product(block, instruction)


def _start_product(block: ThreadBlock, instruction: Instruction) -> None:
    targets, a, b, scale, *flags = instruction.operands
    columns, depth = (int(number) for number in instruction.parts[4].split("n")[1].split("k"))
    names, kind = members(targets), instruction.kind
    block.fragments.sums -= set(names)  # products are added to sums in instruction order
    result = np.zeros((block.threads, len(names)), np.float32)
    if block.predicate(scale)[0]:
        result = block.get_all(names, np.float32)
    major_a, major_b = (kind != "tf32" and str(flag) == "1" for flag in flags[-2:])
    for first in range(0, block.threads, WARPGROUP):
        threads = slice(first, first + WARPGROUP)
        right = _descriptor(block, b, threads, columns, depth, kind, major_b)
        if isinstance(a, tuple):
            left = tensor_cores.operand(_by_warps(block.get_all(members(a), np.uint32)[threads]), kind)
        else:
            left = _descriptor(block, a, threads, 64, depth, kind, major_a).reshape(4, 16, depth)
        sums = _by_warps(result[threads])
        result[threads] = tensor_cores.add_product(left, right.T, sums).reshape(WARPGROUP, -1)
    block.put_all(names, result)
    block.fragments.use(names, members(a) if isinstance(a, tuple) else ())


def _descriptor(
    block: ThreadBlock, operand: Operand, threads: slice, rows: int, depth: int, kind: str, major: bool
) -> Array:
    bits = block.get(operand, np.uint64)[threads]
    if (bits != bits[0]).any():
        raise KernelError("a descriptor that differs within a warpgroup")
    return tensor_cores.load_operand(block.shared, int(bits[0]), rows, depth, kind, major)


Handler = Callable[[Any, Instruction, Array | None], None]
HANDLERS: dict[str, Handler] = {
    "mov": _move,
    "cvt": _convert,
    "cvta": _move,
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "bar": _barrier,
    "barrier": _barrier,
    "cp": _copy,
    "elect": tensor_copies.elect,
    "mbarrier": tensor_copies.barrier,
    "fence": _fence,
    "griddepcontrol": _grid_dependency,
    "membar": _fence,
    "shfl": _shuffle,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply_matrices,
    "wgmma": _multiply_warpgroups,
}
