"""Sums of gradients by hooks are plain autograd's, in fp32."""

from __future__ import annotations

import pytest
import tolerances
import torch
from gradients import autograd_sums, hooked_sums
from models import batches_for
from torch import nn

from lorasb.init.accumulator import GradientSums


@pytest.mark.parametrize("family", ["llama", "gemma2", "roberta"])
def test_sums_are_plain_autograds(family: str) -> None:
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches_for(family) for i in range(2)]
    want, got = autograd_sums(family, singles), hooked_sums(family, singles)
    assert len(got) >= 12
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


def test_bf16_gradients_are_summed_in_fp32() -> None:
    layer = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    want = torch.zeros(6, 8, dtype=torch.float64)
    with GradientSums({"layer": layer}) as found:
        for _ in range(20):
            x, dy = (torch.randn(5, size, generator=g).bfloat16() for size in (8, 6))
            layer(x).backward(dy)
            want += dy.double().t() @ x.double()
    assert found.totals()["layer"].dtype == torch.float32
    tolerances.check(found.totals()["layer"], want, tolerances.fp32(100))
