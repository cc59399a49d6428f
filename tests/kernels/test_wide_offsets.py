"""Offsets that do not fit 32 bits, in Triton's interpreter, over memory that is mapped and hardly touched."""

from __future__ import annotations

import mmap

import environment
import pytest
import reference
import tolerances
import torch

from lorasb.kernels import linear, plan
from lorasb.kernels.block_sizes import GemmConfig, PrepConfig

pytestmark = pytest.mark.skipif(
    bool(environment.PTX), reason="6 GB of addresses are too many to execute compiled code on"
)


def test_rows_of_w_beyond_2_to_the_31_elements() -> None:
    """dx over a W whose rows lie 2^26 elements apart: 6 GB of addresses, of which a few pages are touched."""
    K, N, r, M, stride = 48, 32, 16, 20, 1 << 26
    memory = torch.frombuffer(mmap.mmap(-1, 2 * K * stride), dtype=torch.float16)
    weight = memory.as_strided((K, N), (stride, 1))
    case = reference.make_case((M,), N, K, r, torch.float16, bias=False, scaling=1.0)
    weight.copy_(case.weight)
    chosen = plan.LaunchPlan("fused", PrepConfig(32, 16, 4, 2), GemmConfig(32, 32, 16, 1, 4, 2))
    members = linear.Members([weight], [case.a], [case.core], [case.b], [1.0])
    u = torch.zeros(M, r, dtype=torch.float16)
    dx, _ = linear.backward([case.dy], members, [u], chosen, True, False)
    want, _ = reference.gradients(case.double())
    tolerances.check_half(dx, reference.plain_chain(case)[1], want)
