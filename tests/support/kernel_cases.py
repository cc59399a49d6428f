"""Inputs for kernels, single layers and groups, and what their results are held against."""

from __future__ import annotations

from collections.abc import Sequence

import environment
import reference
import tolerances
import torch
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear_group

# Triton's interpreter multiplies the raw bits of bf16; compiled kernels (--ptx) are held in all three
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if environment.PTX else ()))
Results = list[Tensor]


def run_group(cases: list[reference.Case], backend: str = "triton", dropout: float = 0.0) -> Results:
    """Every y, dx, and every dR, of layers that read the first case's x."""
    x = cases[0].x.clone().requires_grad_(True)
    cores = [case.core.clone().requires_grad_(True) for case in cases]
    with lorasb.backend(backend):
        ys = lora_sb_linear_group(
            x,
            [c.weight for c in cases],
            [c.a for c in cases],
            cores,
            [c.b for c in cases],
            [c.bias for c in cases if c.bias is not None],
            [c.scaling for c in cases],
            dropout=dropout,
        )
        torch.autograd.backward(ys, [c.dy for c in cases])
    return [*(y.detach() for y in ys), x.grad, *(core.grad for core in cores)]


def group_cases(
    M: int, n: int, ms: tuple[int, ...], r: int, dtype: torch.dtype, bias: bool = True
) -> list[reference.Case]:
    cases = [reference.make_case((M,), n, m, r, dtype, bias=bias, scaling=0.5 + i, seed=i) for i, m in enumerate(ms)]
    for case in cases[1:]:
        case.x = cases[0].x
    return cases


def check(results: Sequence[Tensor], wanted: list[Tensor], plain: list[Tensor], lengths: list[int]) -> None:
    """fp32 within the table's bound; 16 bits no further from fp64 than the plain chain, where there is enough to tell."""
    for result, want, chain, length in zip(results, wanted, plain, lengths, strict=True):
        if chain.dtype == torch.float32 and result.dtype == torch.float32 and plain[0].dtype == torch.float32:
            tolerances.check(result, want, tolerances.fp32(max(1, length)))
        elif result.numel() >= tolerances.POOL:
            tolerances.check_half(result, chain, want)
        else:
            tolerances.check(result, want, few_of(plain[0].dtype))


def few_of(dtype: torch.dtype) -> tolerances.Tolerance:
    """The bound of 16-bit results that are too few to compare their noise."""
    return tolerances.BF16_FEW if dtype == torch.bfloat16 else tolerances.HALF_FEW


def check_case(case: reference.Case, results: Sequence[Tensor]) -> None:
    exact, r = case.double(), case.a.shape[0]
    wanted = [reference.forward(exact), *reference.gradients(exact)]
    lengths = [case.x.shape[-1] + r, case.dy.shape[-1] + r, case.x[..., 0].numel()]
    check(results, wanted, list(reference.plain_chain(case)), lengths)


def check_group(cases: list[reference.Case], results: Results) -> None:
    exact = [case.double() for case in cases]
    chains = [reference.plain_chain(case) for case in cases]
    gradients = [reference.gradients(case) for case in exact]
    dx = torch.stack([dx for dx, _ in gradients]).sum(0)
    plain_dx = torch.stack([chain[1] for chain in chains]).sum(0)
    wanted = [*(reference.forward(case) for case in exact), dx, *(dcore for _, dcore in gradients)]
    plain = [*(chain[0] for chain in chains), plain_dx, *(chain[2] for chain in chains)]
    n, r, M = cases[0].x.shape[-1], cases[0].a.shape[0], cases[0].x.shape[0]
    outputs = sum(case.dy.shape[-1] for case in cases)
    lengths = [*(n + r for _ in cases), outputs + r * len(cases), *(M for _ in cases)]
    check(results, wanted, plain, lengths)
