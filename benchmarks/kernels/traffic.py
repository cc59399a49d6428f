"""Bytes and FLOPs of a launch, counted from its own grid and blocks.

Every formula is checked against the loads and stores that the kernels make under the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorasb.kernels.block_sizes import cdiv
from lorasb.kernels.launcher import Launch


@dataclass(frozen=True)
class Traffic:
    """What one launch moves and computes.

    Attributes:
        flops: multiplications and additions of its matrix products, padding included.
        loaded: bytes that its programs ask for.
        stored: bytes that they write.
        compulsory: bytes of its operands and results, each counted once: what DRAM must move at least.
    """

    flops: int
    loaded: int
    stored: int
    compulsory: int


def traffic(launch: Launch) -> Traffic:
    """Count a launch."""
    return {"prep_forward": _prep, "prep_backward": _prep, "extended_gemm": _extended}[launch.name](launch)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _prep(launch: Launch) -> Traffic:
    a = launch.arguments
    forward = launch.name == "prep_forward"
    members, M, R, R_PADDED = len(a["factors"]), a["M"], a["R"], a["R_PADDED"]
    BLOCK_M, BLOCK_K, splits = a["BLOCK_M"], a["BLOCK_K"], a["splits"]
    thin, lengths = (a["v"], [a["K"]]) if forward else (a["w"], list(a["Ks"]))
    size, core_size = thin.element_size(), a["cores"][0].element_size()
    blocks = cdiv(M, BLOCK_M)
    reduction = sum(lengths) * (members if forward else 1)  # columns of factors, over all members
    with_core = forward or a["NEED_DX"]
    partial = blocks * BLOCK_M * R_PADDED * members * splits * 4 if splits > 1 else 0
    loaded = blocks * (BLOCK_M * sum(lengths) + R * reduction) * size + partial
    stored = M * R * members * size + partial
    padded = sum(cdiv(k, BLOCK_K) * BLOCK_K for k in lengths) * (members if forward else 1)
    flops = 2 * blocks * BLOCK_M * R_PADDED * padded
    if with_core:
        loaded += M * R * members * size + blocks * members * R * R * core_size
        stored += M * R_PADDED * members * size
        flops += 2 * blocks * BLOCK_M * R_PADDED * R_PADDED * members
    inputs = [a["x"]] if forward else list(a["dys"])
    compulsory = (
        _bytes(*inputs, *a["factors"], *a["cores"])
        + M * R * members * size
        + (M * R_PADDED * members * size if with_core else 0)
    )
    return Traffic(flops, loaded, stored, compulsory)


def _extended(launch: Launch) -> Traffic:
    a = launch.arguments
    M, R, BLOCK_M, BLOCK_N, BLOCK_K, splits = a["M"], a["R"], a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], a["splits"]
    size, members = a["v"].element_size(), len(a["factors"])
    tiles = (launch.grid - a["core_programs"]) // splits
    segments = [*a["Ks"], *([R] * members if a["BACKWARD"] else [R])]
    partial = tiles * splits * BLOCK_M * BLOCK_N * 4 if splits > 1 else 0
    biases = cdiv(M, BLOCK_M) * sum(a["Ns"]) * size if a["HAS_BIAS"] else 0
    loaded = tiles * (BLOCK_M + BLOCK_N) * sum(segments) * size + partial + biases
    stored = (M * sum(a["Ns"]) * size if tiles else 0) + partial
    flops = 2 * tiles * BLOCK_M * BLOCK_N * sum(cdiv(k, BLOCK_K) * BLOCK_K for k in segments)
    compulsory = 0
    if tiles:
        weights = a["weights"] if sum(a["Ks"]) else ()
        inputs = a["xs"] if sum(a["Ks"]) else ()
        compulsory = _bytes(*inputs, *weights, *a["factors"], *(a["biases"] if a["HAS_BIAS"] else ()), *a["ys"])
        compulsory += M * R * members * size
    core = _core(launch)
    return Traffic(flops + core.flops, loaded + core.loaded, stored + core.stored, compulsory + core.compulsory)


def _core(launch: Launch) -> Traffic:
    """The programs of dR."""
    a = launch.arguments
    if not a["core_programs"]:
        return Traffic(0, 0, 0, 0)
    M, R, BLOCK_R, chunks, size = a["M"], a["R"], a["CORE_BLOCK_R"], a["core_chunks"], a["t"].element_size()
    side, members = cdiv(a["R_PADDED"], BLOCK_R), len(a["dcores"])
    partial = a["core_programs"] * BLOCK_R * BLOCK_R * 4 if chunks > 1 else 0
    result = _bytes(*a["dcores"])
    rows = sum(
        cdiv(min(a["CORE_CHUNK_M"], M - start), a["CORE_BLOCK_M"]) * a["CORE_BLOCK_M"]
        for start in range(0, M, a["CORE_CHUNK_M"])
    )
    return Traffic(
        flops=2 * members * side * side * BLOCK_R * BLOCK_R * rows,
        loaded=2 * M * R * side * members * size + partial,
        stored=result + partial,
        compulsory=2 * M * R * members * size + result,
    )
