"""Compiled kernels on a CUDA GPU: TRITON_INTERPRET=0 python -m pytest tests/kernels/test_gpu.py. Skipped elsewhere."""

import os

import pytest
import tolerances
import torch
from calls import outputs, run, run_kernels
from reference import by_formulas, make_case, plain_chain
from torch import Tensor

from lorasb.kernels.launcher import observed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a CUDA GPU and compiled kernels",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [
    (1, 4096, 4096, 96),
    (16, 4096, 1024, 64),
    (63, 123, 59, 17),
    (512, 576, 1536, 96),
    (2048, 4096, 4096, 96),
    (1023, 4096, 1024, 128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "n", "m", "r"), SHAPES)
def test_no_further_from_fp64_than_the_chain(M: int, n: int, m: int, r: int, dtype: torch.dtype) -> None:
    case = make_case((M,), n, m, r, dtype).to("cuda")
    wanted = by_formulas(case.double())
    results = run_kernels(case)
    for got, chain, want in zip(results, plain_chain(case), wanted, strict=True):
        if got.numel() >= tolerances.POOL:
            tolerances.check_half(got, chain, want)


def test_auto_takes_the_kernels_two_launches_a_direction() -> None:
    case = make_case((16,), 4096, 4096, 96, torch.bfloat16).to("cuda")
    run(case)  # the first call of a kind is checked by additional launches
    with observed() as launches:
        run(case)
    assert [one.name for one in launches] == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]


@pytest.mark.parametrize("M", [16, 512, 3000])
def test_bitwise_repeatable(M: int) -> None:
    cases = [make_case((M,), 1024, m, 96, torch.bfloat16, bias=False).to("cuda") for m in (1024, 512)]
    first = run_kernels(*cases)
    for _ in range(249):
        tolerances.check_equal(run_kernels(*cases), first)


def test_cuda_graphs() -> None:
    case = make_case((40,), 1024, 512, 64, torch.bfloat16).to("cuda")
    run(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        (y,) = outputs([case], case.x, [case.core])
    for _ in range(3):
        case.x.copy_(torch.randn_like(case.x))
        graph.replay()
        assert torch.equal(y, outputs([case], case.x, [case.core])[0])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_without_a_graph_break(mode: str) -> None:
    case = make_case((40,), 256, 128, 16, torch.bfloat16).to("cuda")

    def function(x: Tensor) -> Tensor:
        return torch.relu(outputs([case], x, [case.core])[0])

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for rows in (40, 41, 16, 40, 41, 16):
        assert torch.equal(compiled(case.x[:rows]), function(case.x[:rows]))


def test_rows_do_not_leak() -> None:
    case = make_case((300,), 512, 256, 32, torch.bfloat16).to("cuda")
    want = run(case)[0]
    case.x[7, 3] = float("nan")
    got = run(case)[0]
    others = [i for i in range(300) if i != 7]
    assert torch.isnan(got[7]).all()
    assert torch.equal(got[others], want[others])


def test_capturing_dropout_is_refused() -> None:
    case = make_case((40,), 256, 128, 16, torch.bfloat16).to("cuda")
    with (
        pytest.raises(RuntimeError, match="would replay one mask"),
        torch.no_grad(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        outputs([case], case.x, [case.core], dropout=0.1)
