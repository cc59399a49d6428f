"""Inputs for the Triton kernels, and their dropout masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import environment
import pytest
import tolerances
import torch
from calls import check, run_kernels
from reference import Case, make_case
from torch import Tensor

from lorasb.backends import eager as masks
from lorasb.kernels import linear, plan
from lorasb.kernels.launcher import Launch, observed

# Triton's interpreter multiplies the raw bits of bf16; compiled kernels (--ptx) are tested in all three
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if environment.PTX else ()))
INDEX = [1, 0, -1, 1, 2]  # each row's adapter; -1: none


def group_cases(M: int, n: int, ms: Sequence[int], r: int, dtype: torch.dtype, bias: bool = True) -> list[Case]:
    """Members of these widths that read the same x [M, n]."""
    cases = [make_case((M,), n, m, r, dtype, bias, 0.5 + j, seed=j) for j, m in enumerate(ms)]
    return [replace(case, x=cases[0].x) for case in cases]


def row_cases(tokens: int, n: int, ms: Sequence[int], r: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Members that read the same x [5, tokens, n], with three R's; INDEX picks one for each row."""
    g = torch.Generator().manual_seed(0)
    cases = [make_case((len(INDEX), tokens), n, m, r, dtype, scaling=0.5 + j, seed=j) for j, m in enumerate(ms)]
    return [replace(case, x=cases[0].x, core=case.core * torch.randn(3, r, r, generator=g)) for case in cases]


def checked(*cases: Case) -> list[Launch]:
    """Check a call's results and return its launches."""
    with observed() as launches:
        check(run_kernels(*cases), *cases)
    return launches


@contextmanager
def planned(**changes: object) -> Iterator[None]:
    """Make calls use this path, block size or way of reading 4-bit weights, whatever the tables say.

    Skips the test if that compiles to tcgen05, which nothing here can execute.
    """

    def choice(shape: plan.Shape, arch: str, sms: int) -> plan.LaunchPlan:
        found = replace(plan.choose(shape, arch, sms), **changes)  # type: ignore[arg-type]
        if arch == "sm_100" and not plan.has_executed_code(found, shape, arch):
            pytest.skip("compiles to tcgen05")
        return found

    plan.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choice", choice)
        yield
    plan.forget()


def mask_of(case: Case, seed: int, dropout: float) -> Tensor:
    """Return the kernels' dropout mask of x, found with A = identity."""
    (M, n), dtype = case.x.shape, case.x.dtype
    eye = torch.eye(n, dtype=dtype)
    members = linear.Members([None], [eye], [eye.float()], [eye], [None], [1.0])
    shape = plan.Shape("forward", {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], M, n, n, n)
    chosen = plan.choose(shape, environment.PTX or plan.INTERPRETER, 1)
    mask = linear.Mask(masks.kernel_dropout(dropout), (seed,))
    _, (u,) = linear.forward(torch.ones_like(case.x), members, chosen, mask)
    return u == 1.0


def check_follows_mask(case: Case, dropout: float, tolerance: tolerances.Tolerance) -> None:
    """Check y, dx and dR against the mask of the call's seed; 16-bit dR relative to its largest entry."""
    y, dx, dcore = run_kernels(case, dropout=dropout, seed=5)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64))  # as the call drew it
    wide, mask = case.double(), mask_of(case, seed, dropout).double() / (1 - masks.kernel_dropout(dropout))
    u, t = (wide.x * mask) @ wide.a.t(), wide.dy @ wide.b
    want = wide.scaling * u @ wide.core.t() @ wide.b.t()
    tolerances.check(y, wide.x @ wide.weight.t() + want, tolerance)
    tolerances.check(dx, wide.dy @ wide.weight + mask * (wide.scaling * t @ wide.core @ wide.a), tolerance)
    compare = tolerances.check_scaled if case.x.dtype.itemsize == 2 else tolerances.check
    compare(dcore, wide.scaling * t.t() @ u, tolerance)
