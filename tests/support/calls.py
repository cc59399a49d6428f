"""Forward and backward calls of every kind of adapted linear, and references for their results."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference
import storages
import tolerances
import torch
from reference import Case
from tolerances import POOL
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear, lora_sb_linear_group
from lorasb.ops.calls import DENSE, Operands
from lorasb.quantization.quantized_weight import QuantizedWeight

INDEX = [0, 2, -1, 2, 0, 2, 1]  # each row's adapter out of three; -1: none
# number of members; storage of W (None: no W); whether each row has its own R; whether there are biases
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no bias": {"bias": False},
    "no W": {"weight": None, "bias": False},
    "nf4": {"weight": {}},
    "nested nf4": {"weight": {"nested": True}},
    "int8": {"weight": "int8"},
    "group": {"members": 3},
    "group without biases": {"members": 3, "bias": False},
    "rows": {"rows": True},
    "rows without W": {"rows": True, "weight": None, "bias": False},
    "rows over nf4": {"rows": True, "weight": {}},
    "rows over int8": {"rows": True, "weight": "int8"},
    "rows of a group": {"rows": True, "members": 3},
}
MASKED: dict[str, dict[str, Any]] = {
    "dropout": {"call": {"dropout": 0.5}},
    "dropout of a group": {"members": 3, "call": {"dropout": 0.5}},
}
FEW = ("dense", "no W", "nf4", "group", "rows", "rows over nf4", "rows of a group")  # kinds whose derivatives differ
SOME = [pytest.param(kind, marks=() if kind in FEW else pytest.mark.long) for kind in KINDS]


def make_call(
    kind: str, dtype: torch.dtype, tokens: tuple[int, ...] = (2,), n: int = 64, m: int = 32, r: int = 5
) -> tuple[list[Case], dict[str, Any]]:
    """The cases of a call, x [7, *tokens, n], and its `index` or `dropout`, if it has one."""
    options = (KINDS | MASKED)[kind]
    rows, count = options.get("rows", False), options.get("members", 1)
    g, stored = torch.Generator().manual_seed(1), torch.float32 if dtype == torch.float64 else dtype
    cases = [
        reference.make_case((len(INDEX), *tokens), n, m + 5 * j, r, dtype, options.get("bias", True), 0.7 + j, seed=j)
        for j in range(count)
    ]
    for case in cases:
        case.x = cases[0].x
        if rows:
            case.core = case.core * torch.randn(3, r, r, generator=g).to(case.core)
        match options.get("weight", case.weight):
            case "int8":
                case.weight = storages.octets(m, n, stored)
            case dict(of):
                case.weight = storages.storage(m, n, dtype=stored, **of)
            case weight:
                case.weight = weight
    return cases, {"index": INDEX} if rows else dict(options.get("call", {}))


def outputs(cases: Sequence[Case], x: Tensor, cores: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """The y_j of one layer, or of a group."""
    if len(cases) == 1:
        (c,), (core,) = cases, cores
        return [lora_sb_linear(x, c.weight, c.a, core, c.b, c.bias, c.scaling, **options)]
    weights, a, b = ([getattr(case, name) for case in cases] for name in ("weight", "a", "b"))
    biases = [case.bias for case in cases if case.bias is not None]
    return lora_sb_linear_group(x, weights, a, list(cores), b, biases, [case.scaling for case in cases], **options)


def run(
    *cases: Case,
    x: Tensor | None = None,
    used: Sequence[int] = (),
    backend: str = "",
    seed: int | None = None,
    **options: Any,
) -> list[Tensor]:
    """The y_j, dx and the dR_j of a loss that reads all y_j, or only those in `used`; `seed` seeds dropout."""
    if seed is not None:
        torch.manual_seed(seed)
    x = (cases[0].x.clone() if x is None else x).requires_grad_(True)
    cores = [case.core.clone().requires_grad_(True) for case in cases]
    used = used or range(len(cases))
    with lorasb.backend(backend) if backend else nullcontext():
        ys = outputs(cases, x, cores, **options)
        torch.autograd.backward([ys[j] for j in used], [cases[j].dy for j in used])
    return [*(y.detach() for y in ys), x.grad, *(core.grad for core in cores)]  # type: ignore[list-item]


run_kernels = partial(run, backend="triton")


def dense(case: Case, meant: bool = False) -> Case:
    """The case with W as a dense tensor; `meant`: in 16 bits, W before it is rounded."""
    weight = case.weight
    if weight is None:
        weight = case.x.new_zeros(case.b.shape[0], case.a.shape[1])
    elif isinstance(weight, QuantizedWeight):
        half = meant and case.x.dtype.itemsize == 2
        weight = storages.unrounded(weight) if half else storages.exact(weight, case.x.dtype)
    return replace(case, weight=weight)


def exact(*cases: Case, index: list[int] | None = None) -> list[Tensor]:
    """The results of `run` in fp64, by the formulas."""
    wide = [dense(case, meant=True).double() for case in cases]
    return reference.by_rows(reference.by_formulas, wide, index)


def plain(*cases: Case, index: list[int] | None = None) -> list[Tensor]:
    """The results of `run` in x's dtype, by the plain chain."""
    return reference.by_rows(reference.plain_chain, [dense(case) for case in cases], index)


def check(results: Sequence[Tensor], *cases: Case, index: list[int] | None = None) -> None:
    """Check fp32 within the table's bound, and large enough 16-bit results as no further from fp64 than the chain."""
    first, r, count = cases[0], cases[0].a.shape[0], len(cases)
    tokens = first.x[..., 0].numel()
    lengths = [first.x.shape[-1] + r] * count + [sum(c.dy.shape[-1] for c in cases) + r * count] + [tokens] * count
    wanted = exact(*cases, index=index)
    chains = wanted if first.x.dtype == torch.float32 else plain(*cases, index=index)  # the slowest part
    for result, want, chain, length in zip(results, wanted, chains, lengths, strict=True):
        if first.x.dtype == torch.float32:
            tolerances.check(result, want, tolerances.fp32(max(1, length)))
        elif result.numel() >= POOL:
            tolerances.check_half(result, chain, want)
        else:
            tolerances.check(result, want, few_of(first.x.dtype))


def few_of(dtype: torch.dtype) -> tolerances.Tolerance:
    """The bound for 16-bit results with too few elements to compare rounding noise."""
    return tolerances.BF16_FEW if dtype == torch.bfloat16 else tolerances.HALF_FEW


def check_pooled(rows: int, n: int, m: int, r: int, dtype: torch.dtype, cores: bool = True, **options: Any) -> None:
    """Check y, dx and dR in 16 bits over enough seeds to compare; without `cores`, dR only if y's and dx's suffice."""
    seeds = -(-POOL // min(rows * n, rows * m, r * r if cores else POOL))
    check_halves([reference.make_case((rows,), n, m, r, dtype, seed=seed, **options) for seed in range(seeds)])


def check_halves(cases: Sequence[Case]) -> None:
    """Check y, dx and, if it has enough elements, dR of all cases together, in 16 bits."""
    pools: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for case in cases:
        for pool, *values in zip(pools, run(case), plain(case), exact(case), strict=True):
            pool.append(tuple(value.reshape(-1) for value in values))
    for pool in pools[: 3 if sum(case.core.numel() for case in cases) >= POOL else 2]:
        tolerances.check_half(*(torch.cat(part) for part in zip(*pool, strict=True)))


def operands_of(*cases: Case, index: list[int] | None = None, dropout: float = 0.0, seeds: Any = None) -> Operands:
    """The op's operands for one or several cases."""
    base, layout = [case.weight for case in cases if case.weight is not None], DENSE
    if base and isinstance(base[0], QuantizedWeight):
        base, layout = base[0].tensors, base[0].layout(cases[0].x.dtype)
    biases = [case.bias for case in cases if case.bias is not None]
    lists = [[getattr(case, name) for case in cases] for name in ("a", "core", "b")]
    rows = None if index is None else torch.tensor(index)
    return Operands(base, layout, *lists, biases, [c.scaling for c in cases], rows, dropout, seeds)


def opcheck(backend: str, *cases: Case, frozen: str = "", **options: Any) -> None:
    """Run torch's opcheck on a backend's op and its backward; `frozen`: "x" or "core" needs no gradient."""
    plain, suffix = operands_of(*cases, **options), "" if backend == "auto" else f"_{backend}"
    x, cores = cases[0].x.requires_grad_(frozen != "x"), [c.requires_grad_(frozen != "core") for c in plain.cores]
    torch.library.opcheck(
        getattr(torch.ops.lorasb, f"adapted_linear{suffix}").default, (x, *plain._replace(cores=cores))
    )
    plain, x = plain._replace(cores=[core.detach() for core in cores]), x.detach()
    if len(cases) == 1 and not (plain.is_quantized or plain.row_index is not None or plain.dropout):
        base, biases = (list(one) or [None] for one in (plain.base, plain.biases))
        arguments = x, base[0], plain.a[0], plain.cores[0], plain.b[0], biases[0], plain.scalings[0]
        torch.library.opcheck(getattr(torch.ops.lorasb, f"serve_dense{suffix}").default, arguments)
    us = [x.reshape(-1, x.shape[-1]) @ case.a.t() for case in cases]
    op = getattr(torch.ops.lorasb, f"adapted_linear_backward{suffix}").default
    for need_dx, need_dcores in ((True, True), (True, False), (False, True)):
        arguments = [case.dy for case in cases], us, *plain._replace(biases=[]), need_dx, need_dcores
        # the backward op itself has no derivative
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
