"""The op's dropout: unbiased, on the adapter alone, from the global seed, without a mask in memory."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from calls import check_dropout_follows_the_global_seed, run
from kernel_cases import group_cases, run_group
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear

pytestmark = pytest.mark.usefixtures("composed")


def test_gradcheck_with_dropout() -> None:
    case = reference.make_case((4,), 7, 6, 3, torch.float64)

    def function(x: Tensor, core: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling, dropout=0.4)

    assert torch.autograd.gradcheck(
        function, (case.x.requires_grad_(True), case.core.requires_grad_(True)), **tolerances.GRADCHECK
    )


def test_dropout_keeps_a_seed_and_no_mask() -> None:
    case = reference.make_case((64,), 100, 50, 4, torch.float32)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_sb_linear(case.x, case.weight, case.a, case.core.requires_grad_(True), case.b, dropout=0.5)
    assert sorted(sizes) == sorted([1, 64 * 4, case.weight.numel(), case.a.numel(), case.core.numel(), case.b.numel()])


def test_dropout_is_an_unbiased_mask_on_the_adapter_alone() -> None:
    case = reference.make_case((2000,), 16, 8, 4, torch.float32, bias=False)
    case.x = torch.ones_like(case.x)
    torch.manual_seed(0)
    y = lora_sb_linear(case.x, case.weight, case.a, case.core, case.b, scaling=case.scaling, dropout=0.25)
    base = case.x @ case.weight.t()
    without = reference.forward(case) - base
    with_dropout = y - base
    assert with_dropout.std(0).min() > 0
    standard_error = with_dropout.std(0) / 2000**0.5
    assert ((with_dropout.mean(0) - without[0]).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_groups_masks_are_those_of_separate_calls(backend: str, dtype: torch.dtype) -> None:
    cases = group_cases(30, 24, (20, 16, 12), 4, dtype)
    torch.manual_seed(5)
    *ys, dx, first, second, third = run_group(cases, backend, dropout=0.4)
    torch.manual_seed(5)
    with lorasb.backend(backend):
        apart = [run(case, dropout=0.4) for case in cases]
    for y, dcore, (want_y, _, want_dcore) in zip(ys, (first, second, third), apart, strict=True):
        assert torch.equal(y, want_y)
        assert torch.equal(dcore, want_dcore)
    assert torch.equal(dx, apart[0][1] + apart[1][1] + apart[2][1])


def test_dropout_follows_the_global_seed() -> None:
    case = reference.make_case((8,), 16, 8, 4, torch.float32)
    check_dropout_follows_the_global_seed(run, case)


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1, float("nan")])
def test_a_probability_that_is_none_is_refused(dropout: float) -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    with pytest.raises(ValueError, match=r"expected dropout in \[0, 1\)"):
        lora_sb_linear(case.x, case.weight, case.a, case.core, case.b, dropout=dropout)
    with pytest.raises(ValueError, match=r"expected dropout in \[0, 1\)"):
        lorasb.functional.lora_sb_linear_group(
            case.x, *[[t] for t in (case.weight, case.a, case.core, case.b)], dropout=dropout
        )
