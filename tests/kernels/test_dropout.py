"""Dropout in the kernels: a mask that is a function of seed and place, the same in forward and backward."""

from __future__ import annotations

import reference
import tolerances
import torch
from calls import run_kernels as run
from torch import Tensor

from lorasb.kernels import linear as launch
from lorasb.kernels import plan


class TestDropout:
    def test_gradients_follow_the_mask_of_the_forward(self) -> None:
        case = reference.make_case((40,), 70, 64, 8, torch.float32, bias=False)
        torch.manual_seed(5)
        y, dx, dcore = run(case, dropout=0.4)
        exact = case.double()
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)  # as the call drew it
        mask = mask_of(case, int(seed), 0.4).double() / 0.6
        u, t = (exact.x * mask) @ exact.a.t(), exact.dy @ exact.b
        tolerances.check(
            y, exact.x @ exact.weight.t() + exact.scaling * u @ exact.core.t() @ exact.b.t(), tolerances.fp32(80)
        )
        want_dx = exact.dy @ exact.weight + mask * (exact.scaling * t @ exact.core @ exact.a)
        tolerances.check(dx, want_dx, tolerances.fp32(80))
        tolerances.check(dcore, exact.scaling * t.t() @ u, tolerances.fp32(80))

    def test_the_mask_keeps_its_share_and_differs_by_seed(self) -> None:
        case = reference.make_case((300,), 100, 8, 4, torch.float32)
        masks = [mask_of(case, seed, 0.3) for seed in (1, 2)]
        for mask in masks:
            assert abs(mask.float().mean() - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
        assert (masks[0] != masks[1]).float().mean() > 0.3

    def test_it_follows_the_global_seed(self) -> None:
        case = reference.make_case((20,), 40, 24, 4, torch.float32)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(run(case, dropout=0.5))
        for first, second, third in zip(*results, strict=True):
            assert torch.equal(first, second)
            assert not torch.equal(first, third)


def mask_of(case: reference.Case, seed: int, dropout: float) -> Tensor:
    """What the kernels keep of x, seen through A = all unit vectors."""
    M, n = case.x.shape
    members = launch.Members([None], [torch.eye(n)], [torch.eye(n)], [torch.eye(n)], [1.0])
    shape = plan.Shape("forward", "fp32", M, n, n, n)
    chosen = plan.choose(shape, plan.INTERPRETER, 1)
    _, (u,) = launch.forward(torch.ones(M, n), members, [None], chosen, launch.Mask(dropout, seed))
    return u == 1.0
