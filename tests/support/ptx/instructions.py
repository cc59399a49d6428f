"""Instructions that are more than arithmetic: moves, memory, copies, barriers, shuffles and matrices, by opcode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic, formats, tensor_copies, tensor_cores
from .faults import KernelError
from .formats import BITS, Array
from .program import Address, Instruction
from .shared_memory import words_of

if TYPE_CHECKING:
    from .thread_block import ThreadBlock

WARP, WARPGROUP = 32, 128


def _move(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """mov: also takes a register apart into {halves}, or puts one together from them."""
    target, source = instruction.operands
    if instruction.kind == "pred":
        block.put(target, block.predicate(source).copy(), active)
        return
    dtype = block.dtype_of(instruction)
    if isinstance(target, tuple):
        half = BITS[np.dtype(dtype).itemsize // len(target)]
        pieces = np.ascontiguousarray(block.get(source, dtype)).view(half).reshape(block.threads, -1)
        for i, name in enumerate(target):
            block.put(name, pieces[:, i].copy(), active)
        return
    if isinstance(source, tuple):
        half = BITS[np.dtype(dtype).itemsize // len(source)]
        joined = np.stack([block.packed(name, half) for name in source], 1).copy().view(dtype)[:, 0]
        block.put(target, joined, active)
        return
    block.put(target, block.get(source, dtype), active)


def _set_predicate(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """setp: a comparison, with another predicate where `.and` or `.or` says so."""
    target, a, b, *others = instruction.operands
    dtype, operation = block.dtype_of(instruction), instruction.parts[1]
    with np.errstate(all="ignore"):
        result = arithmetic.compare(operation, dtype, block.get(a, dtype), block.get(b, dtype))
    if instruction.parts[2] == "and":
        result = result & block.predicate(others[0])
    elif instruction.parts[2] == "or":
        result = result | block.predicate(others[0])
    block.put(target, result, active)


def _select(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    target, a, b, condition = instruction.operands
    dtype = block.dtype_of(instruction)
    block.put(target, np.where(block.predicate(condition), block.get(a, dtype), block.get(b, dtype)), active)


def _convert(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    target, *sources = instruction.operands
    kind = ".".join(instruction.parts[1:])
    if kind in ("rn.bf16x2.f32", "rn.f16x2.f32"):
        one = formats.to_bf16 if "bf16" in kind else formats.to_f16
        high, low = (one(block.get(source, np.float32)).astype(np.uint32) for source in sources)
        block.put(target, (high << np.uint32(16)) | low, active)
        return
    with np.errstate(all="ignore"):
        result = arithmetic.convert(instruction.parts, lambda dtype: block.get(sources[0], dtype))
    if result is None:
        raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
    block.put(target, result, active)


def _vector(operand: Any) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _load(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """ld: of a parameter, of shared or of global memory; one to four values."""
    targets, source = _vector(instruction.operands[0]), instruction.operands[1]
    if not isinstance(source, Address):
        raise KernelError(f"ld without an address at {block.where}")
    dtype, space = block.dtype_of(instruction), instruction.parts[1]
    if space == "param":
        block.put(targets[0], _parameter(block, source, dtype), active)
        return
    threads = block.chosen(active)
    size = np.dtype(dtype).itemsize * len(targets)
    warps, where = block.warps[threads], block.where
    if space.startswith("shared"):
        addresses = block.addresses(source, np.uint32, threads)
        values = block.shared.read(addresses, size, warps, dtype, where)
    else:
        addresses = block.addresses(source, np.uint64, threads)
        words = block.memory.read(addresses, size, warps, block.place.program, block.shared.clock, where)
        values = np.ascontiguousarray(words).view(dtype)
    for i, name in enumerate(targets):
        full = np.zeros(block.threads, dtype)
        full[threads] = values[:, i]
        block.put(name, full, active)


def _parameter(block: ThreadBlock, source: Address, dtype: Any) -> Array:
    """A kernel parameter's value, by name or by its place among the parameters."""
    if source.base[0] != "%":
        places = np.full(block.threads, block.program.places[source.base] + source.offset)
    else:
        places = block.get(source.base, np.uint64).astype(np.int64) + source.offset
    result = np.zeros(block.threads, dtype)
    for place in np.unique(places).tolist():
        if place not in block.program.names:
            raise KernelError(f"ld.param between parameters at {block.where}")
        value = block.values[block.program.names[place]]
        bits = np.float32(value).view(np.uint32) if isinstance(value, float) else np.uint64(value % 2**64)
        result[places == place] = np.asarray(bits).astype(BITS[np.dtype(dtype).itemsize]).view(dtype)
    return result


def _store(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """st: to shared or global memory; one to four values."""
    target, sources = instruction.operands[0], _vector(instruction.operands[1])
    if not isinstance(target, Address):
        raise KernelError(f"st without an address at {block.where}")
    dtype, threads = block.dtype_of(instruction), block.chosen(active)
    values = np.stack([block.get(source, dtype) for source in sources], 1)[threads]
    size, warps = np.dtype(dtype).itemsize * len(sources), block.warps[threads]
    if instruction.parts[1].startswith("shared"):
        block.shared.write(block.addresses(target, np.uint32, threads), values, size, warps, block.where)
        return
    words = np.ascontiguousarray(values).view(words_of(size))
    addresses = block.addresses(target, np.uint64, threads)
    block.memory.write(addresses, words, size, warps, block.place.program, block.shared.clock, block.where)


def _atomic(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """atom.global.gpu.ORDER.add.u32: acq_rel orders programs, relaxed does not."""
    order = instruction.parts[3] if len(instruction.parts) == 6 else ""
    if order not in ("acq_rel", "relaxed") or instruction.parts != ("atom", "global", "gpu", order, "add", "u32"):
        raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
    target, address, value = instruction.operands
    threads = block.chosen(active)
    former = np.zeros(block.threads, np.uint32)
    values = block.get(value, np.uint32)[threads]
    addresses = block.addresses(address, np.uint64, threads)
    former[threads] = block.memory.atomic_add(
        addresses, values, block.place.program, block.shared.clock, block.where, ordered=order == "acq_rel"
    )
    block.put(target, former, active)


def _barrier(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """bar.sync and barrier.sync of all threads; bar.warp.sync orders lanes, which are in lockstep here."""
    if "warp" in instruction.parts:
        return
    block.all_threads(active)
    block.shared.barrier()


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
        block.shared.wait_for_copies(int(str(instruction.operands[0]), 0) if kind == "wait_group" else 0)
        return
    target, source, count, *given = instruction.operands
    size, threads = int(str(count), 0), block.chosen(active)
    taken = block.get(given[0], np.uint32)[threads] if given else np.full(len(threads), size, np.uint32)
    if not ((taken == size) | (taken == 0)).all():
        raise KernelError(f"cp.async of a part of its bytes is not known, at {block.where}")
    words = np.zeros((len(threads), size // 4), np.uint32)
    reading = threads[taken == size]
    if len(reading):
        addresses = block.addresses(source, np.uint64, reading)
        clock, where = block.shared.clock, block.where
        words[taken == size] = block.memory.read(
            addresses, size, block.warps[reading], block.place.program, clock, where
        )
    block.shared.start_copy(block.addresses(target, np.uint32, threads), words, size, block.warps[threads], block.where)


def _fence(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """fence.proxy.async makes writes visible to wgmma and copies; other fences order what is in order here."""
    if instruction.parts[1:3] == ("proxy", "async"):
        block.shared.fences += 1


def _grid_dependency(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """griddepcontrol.wait for the launch before; launch_dependents changes nothing here, where launches take turns."""
    block.all_threads(active)
    if instruction.parts[1] == "wait":
        block.memory.waited.add(block.place.program)


def _shuffle(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """shfl.sync over whole warps."""
    block.whole_warps(active)
    target, source, by, clamp = instruction.operands[:4]
    bounds = block.get(clamp, np.uint32)
    if ((bounds & np.uint32(0x1F1F)) != 31).any() and (bounds != 0).any():
        raise KernelError(f"shfl over parts of a warp is not known, at {block.where}")
    lane, step = block.lanes % WARP, block.get(by, np.uint32).astype(np.int64)
    lanes = {
        "idx": step % WARP,
        "bfly": lane ^ step,
        "down": np.where(lane + step < WARP, lane + step, lane),
        "up": np.where(lane >= step, lane - step, lane),
    }[instruction.parts[2]]
    value = block.get(source, np.uint32)
    block.put(str(target).split("|")[0], value[block.lanes // WARP * WARP + lanes], active)


def _warp_rows(block: ThreadBlock, operand: Any, count: int) -> tuple[Array, Array]:
    """The addresses of 8·count rows that the lanes of each warp give [W, 8·count], and those lanes' threads."""
    every = block.addresses(operand, np.uint32, block.lanes).reshape(-1, WARP)[:, : 8 * count]
    threads = block.lanes.reshape(-1, WARP)[:, : 8 * count]
    return every, threads.reshape(-1)


def _load_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """ldmatrix.m8n8.x1, .x2, .x4 of b16, also transposed."""
    block.all_threads(active)
    targets = _vector(instruction.operands[0])
    rows, threads = _warp_rows(block, instruction.operands[1], len(targets))
    halves = block.shared.read(rows.reshape(-1), 16, block.warps[threads], np.uint16, block.where)
    matrices = halves.reshape(len(rows), len(targets), 8, 8)
    registers = tensor_cores.from_rows(matrices, "trans" in instruction.parts)
    for i, name in enumerate(targets):
        block.put(name, registers[:, :, i].reshape(-1), None)


def _store_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """stmatrix."""
    block.all_threads(active)
    sources = _vector(instruction.operands[1])
    rows, threads = _warp_rows(block, instruction.operands[0], len(sources))
    registers = np.stack([block.get(source, np.uint32).reshape(-1, WARP) for source in sources], 2)
    halves = tensor_cores.to_rows(registers, "trans" in instruction.parts).reshape(-1, 8)
    block.shared.write(rows.reshape(-1), halves, 16, block.warps[threads], block.where)


def _multiply_matrices(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """mma.sync.aligned.SHAPE.row.col.f32.A.B.f32."""
    block.all_threads(active)
    parts = instruction.parts
    if parts[4:7] != ("row", "col", "f32") or parts[-1] != "f32":
        raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
    targets, *sources = map(_vector, instruction.operands)

    def warps(names: tuple[str, ...], dtype: Any) -> Array:
        return np.stack([block.get(name, dtype).reshape(-1, WARP) for name in names], 2)

    a, b, c = (warps(names, kind) for names, kind in zip(sources, (np.uint32, np.uint32, np.float32), strict=True))
    result = tensor_cores.mma(parts[3], (parts[7], parts[8]), a, b, c)
    for i, name in enumerate(targets):
        block.put(name, result[:, :, i].reshape(-1), None)


def _multiply_warpgroups(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """wgmma: its fence and groups, and mma_async.sync.aligned.mMnNkK.f32.A.B over groups of four warps."""
    kind = instruction.parts[1]
    if kind == "fence":
        return
    if kind == "commit_group":
        block.shared.products.commit()
        block.fragments.commit()
        return
    if kind == "wait_group":
        pending = int(str(instruction.operands[0]), 0)
        block.shared.wait_for_products(pending)
        block.fragments.wait(pending)
        return
    block.all_threads(active)
    targets, a, b, scale, *flags = instruction.operands
    columns, depth = (int(number) for number in instruction.parts[4].split("n")[1].split("k"))
    accumulates = bool(block.predicate(scale)[0])
    names = [str(name) for name in _vector(targets)]
    in_flight = block.fragments.sums.intersection(names)
    block.fragments.sums -= in_flight  # sums are added to in the order of the instructions
    former = np.zeros((block.threads, len(_vector(targets))), np.float32)
    if accumulates:
        former = np.stack([block.get(name, np.float32) for name in _vector(targets)], 1)
    result = np.empty_like(former)
    halves = instruction.kind != "tf32"
    major_b = halves and str(flags[-1]) == "1"
    major_a = halves and not isinstance(a, tuple) and str(flags[-2]) == "1"
    for first in range(0, block.threads, WARPGROUP):
        threads = slice(first, first + WARPGROUP)
        right = _descriptor(block, b, threads, columns, depth, instruction.kind, major_b)
        if isinstance(a, tuple):
            registers = np.stack([block.get(name, np.uint32)[threads].reshape(4, WARP) for name in a], 2)
            left = tensor_cores.operand_a(registers, instruction.kind).reshape(64, -1)
        else:
            left = _descriptor(block, a, threads, 64, depth, instruction.kind, major_a)
        with np.errstate(all="ignore"):
            product = left.astype(np.float64) @ right.astype(np.float64).T
        result[threads] = tensor_cores.warpgroup_result(product, former[threads])
    for i, name in enumerate(names):
        block.put(name, result[:, i], None)
    block.fragments.use(names, [str(name) for name in a] if isinstance(a, tuple) else [])


def _descriptor(
    block: ThreadBlock, operand: Any, threads: slice, rows: int, depth: int, kind: str, major: bool
) -> Array:
    bits = block.get(operand, np.uint64)[threads]
    if (bits != bits[0]).any():
        raise KernelError(f"a descriptor that differs within a warpgroup, at {block.where}")
    return tensor_cores.load_operand(block.shared, int(bits[0]), rows, depth, kind, major, block.where)


Handler = Callable[[Any, Instruction, Array | None], None]
HANDLERS: dict[str, Handler] = {
    "mov": _move,
    "setp": _set_predicate,
    "selp": _select,
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
