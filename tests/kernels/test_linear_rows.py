"""Rows with different R's through the fused kernels, under Triton's interpreter."""

import numpy as np
import pytest
import tolerances
import torch
from calls import exact, outputs, run_kernels
from kernel_cases import INDEX, row_cases
from storages import storage

import lorasb
from lorasb.functional import lora_sb_linear
from lorasb.kernels.launcher import observed


@pytest.mark.parametrize(("tokens", "n", "m", "r"), [(1, 64, 48, 16), (13, 123, 59, 5), (20, 112, 128, 96)])
def test_rows_are_eagers_with_the_extended_gemm_as_it_is(tokens: int, n: int, m: int, r: int) -> None:
    (case,) = row_cases(tokens, n, (m,), r)
    with observed() as launches:
        found = run_kernels(case, index=INDEX)
    assert [one.name for one in launches] == [
        "prep_forward",
        "times_row_cores",
        "extended_gemm",
        "prep_backward",
        "times_row_cores",
        "extended_gemm",
        "row_core_gradients",
    ]
    tolerances.check(found, exact(case, index=INDEX), tolerances.fp32(n + m + r))


@pytest.mark.parametrize("r", [16, pytest.param(40, marks=pytest.mark.long), 144])
def test_cores_of_a_bank_are_read_where_they_lie(r: int) -> None:
    """R's that are bf16 columns of a wider storage give the same bits as R's in fp32."""
    (case,) = row_cases(5, 160, (144,), r)
    stored = torch.randn(3, 7 + r * r).bfloat16()
    view = stored[:, 7:].unflatten(1, (r, r))
    view.copy_(case.core)
    with torch.no_grad(), lorasb.backend("triton"), observed() as launches:
        found, want = (outputs([case], case.x, [cores], index=INDEX)[0] for cores in (view, view.float()))
    assert torch.equal(found, want)
    given = next(one.arguments["cores"] for one in launches if one.name == "times_row_cores")
    assert given.data_ptr() == view.data_ptr()


def test_rows_of_no_adapter_are_the_base_whatever_the_cores_hold() -> None:
    (case,) = row_cases(3, 64, (48,), 16)
    case.core[0] = float("nan")
    with torch.no_grad(), lorasb.backend("triton"):
        (y,) = outputs([case], case.x, [case.core], index=[-1, 1, -1, 2, -1])
    want = torch.nn.functional.linear(case.x, case.weight, case.bias)
    tolerances.check(y[[0, 2, 4]], want[[0, 2, 4]], tolerances.fp32(64))
    assert y.isfinite().all()


def test_a_gradient_does_not_depend_on_the_rows_of_others() -> None:
    """Bit for bit, whatever adapters and values the other rows have; repeats are equal, too."""
    (case,) = row_cases(7, 64, (48,), 24)
    want = run_kernels(case, index=INDEX)[2][1]
    assert torch.equal(run_kernels(case, index=INDEX)[2][1], want)
    for i, owner in enumerate(INDEX):
        if owner != 1:
            case.x[i], case.dy[i] = torch.randn(7, 64), torch.randn(7, 48)
    assert torch.equal(run_kernels(case, index=[1, 2, 2, 1, -1])[2][1], want)


def test_an_index_that_was_written_to_is_read_again() -> None:
    (case,) = row_cases(2, 64, (48,), 16)
    index = torch.tensor(INDEX)

    def both() -> list[torch.Tensor]:
        found = []
        for backend in ("triton", "eager"):
            with torch.no_grad(), lorasb.backend(backend):
                found.append(lora_sb_linear(case.x, case.weight, case.a, case.core, case.b, index=index))
        return found

    before, _ = both()
    index.copy_(torch.tensor([0, 1, 2, -1, 0]))
    after, want = both()
    assert not torch.equal(after, before)
    tolerances.check(after, want, tolerances.fp32(64 + 48 + 16))
    numbers = np.array(INDEX)
    index = torch.from_numpy(numbers)
    assert all(map(torch.equal, both(), (before, _)))
    numbers[:] = [0, 1, 2, -1, 0]  # not through torch: the version stays the same
    assert all(map(torch.equal, both(), (after, want)))
    with torch.inference_mode():
        index = torch.tensor(INDEX)
        assert all(map(torch.equal, both(), (before, _)))


def test_a_quantized_base() -> None:
    (case,) = row_cases(3, 128, (64,), 8)
    case.weight = storage(64, 128, dtype=torch.float32)
    tolerances.check(run_kernels(case, index=INDEX), exact(case, index=INDEX), tolerances.fp32(128 + 64))


def test_an_index_out_of_range_is_an_error_before_a_launch() -> None:
    (case,) = row_cases(2, 64, (48,), 16)
    with (
        observed() as launches,
        lorasb.backend("triton"),
        pytest.raises(IndexError, match=r"expected index in \[-1, 2\), .* got 2"),
    ):
        lora_sb_linear(case.x, case.weight, case.a, case.core[:2], case.b, index=INDEX)
    assert not launches


@pytest.mark.parametrize(
    ("tokens", "r"), [(1, 16), (13, 24), *(pytest.param(tokens, 144, marks=pytest.mark.long) for tokens in (1, 5))]
)
def test_a_group_takes_one_pass_over_x_and_one_extended_gemm(tokens: int, r: int) -> None:
    cases = row_cases(tokens, 160, (148, 150, 144), r)
    with observed() as launches:
        found = run_kernels(*cases, index=INDEX)
    forward = ["prep_forward"] * (2 if r == 144 else 1)  # at r = 144 the sums of three do not fit into registers
    assert [one.name for one in launches if "rows" not in one.name and "row_core" not in one.name] == [
        *forward,
        "extended_gemm",
        "prep_backward",
        "extended_gemm",
    ]
    assert sum(one.name == "times_row_cores" for one in launches) == 6
    tolerances.check(found, exact(*cases, index=INDEX), tolerances.fp32(160 + 3 * 150 + r))
