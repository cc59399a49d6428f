"""The TMA path in 16 bits: values of layers and groups, when it is chosen, and what falls back to cuBLAS."""

import re
from collections.abc import Iterator
from dataclasses import replace

import environment
import pytest
import reference
import torch
from calls import run_kernels as run
from kernel_cases import DTYPES, checked, group_cases, planned

from benchmarks.kernels.ptx import KernelError, execute
from benchmarks.kernels.ptx.launch import compile_launch
from benchmarks.kernels.ptx.plugin import Executor
from lorasb.backends import autotune
from lorasb.compat.triton import has_tma
from lorasb.kernels import prepared_linear, tma_gemm
from lorasb.kernels.block_sizes import GemmConfig
from lorasb.kernels.launcher import Launch, observed

pytestmark = [
    pytest.mark.skipif(environment.PTX not in ("", "sm_90"), reason="chosen only on sm_90"),
    pytest.mark.skipif(not has_tma(), reason="Triton launches no tuples of descriptors before 3.8"),
]
HALVES = DTYPES[1:]


@pytest.fixture(autouse=True, params=autotune.TMA_GEMMS, ids=lambda gemm: f"{gemm.block_m}x{gemm.block_n}")
def by_tma(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[GemmConfig]:
    """Use TMA with these tiles for every call, with three programs, so that each computes several tiles."""
    monkeypatch.setattr(tma_gemm, "MULTIPROCESSORS", 3)
    with planned(path="tma", gemm=request.param):
        yield request.param


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("M", "n", "ms", "r"), [(300, 136, (328,), 24), (130, 512, (264, 120), 96), (16, 64, (48,), 8)]
)
def test_matches_reference(M: int, n: int, ms: tuple[int, ...], r: int, dtype: torch.dtype) -> None:
    """Lengths that are not multiples of the blocks; a bias if there is one layer."""
    cases = group_cases(M, n, ms, r, dtype, bias=len(ms) == 1)
    launches = checked(*cases)
    names = [one.name for one in launches]
    assert names == ["prep_forward", "tma_gemm", "prep_backward", "tma_gemm", "extended_gemm"]


@pytest.mark.skipif(not environment.PTX, reason="prepares compiled kernels: pytest --ptx sm_90")
def test_prepared_launches_have_the_same_order() -> None:
    """dR's launch comes last: no launch separates the thin products from the launch that overlaps them."""
    prepared_linear.forget()
    case = reference.make_case((20,), 64, 48, 8, torch.float16)
    checked(case)
    run(case)
    (kind,) = prepared_linear._backwards.values()
    assert kind.before is not None
    assert kind.after is None
    assert [one.call.name for one in kind.before.launches] == ["prep_backward", "tma_gemm", "extended_gemm"]


@pytest.mark.parametrize(("n", "m", "r"), [(123, 48, 8), (64, 59, 8), (64, 48, 3)])
def test_rows_that_are_not_aligned_go_to_cublas(n: int, m: int, r: int) -> None:
    case = reference.make_case((20,), n, m, r, torch.float16)
    launches = checked(case)
    assert "tma_gemm" not in [one.name for one in launches][:2]


def test_fp32_goes_to_cublas_and_masked_gradients_are_added() -> None:
    case = reference.make_case((20,), 64, 48, 8, torch.float32)
    launches = checked(case)
    assert "tma_gemm" not in [one.name for one in launches]
    with observed() as launches:
        run(reference.make_case((20,), 64, 48, 8, torch.float16), dropout=0.25)
    forward, backward = launches[:2], launches[2:]  # the masked term is added to the base's dx
    assert [one.name for one in forward] == ["prep_forward", "tma_gemm"]
    assert [one.name for one in backward] == ["prep_backward", "tma_gemm", "extended_gemm"]
    assert len(backward[1].arguments["lefts"][0]) == 1
    overlapping = [i for i, one in enumerate(launches) if one.options.get("launch_pdl")]
    assert overlapping == ([1] if environment.PTX else [])


# Each ordering and each number that a copy depends on, removed or changed in turn.
MUTATIONS = {
    "a wait for a copy": (r"@!complete bra\.uni\s+waitLoop;", ""),
    "a wait of one phase for another": (r"(mbarrier\.try_wait\.parity\S* complete, \[%r\d+\]), %r\d+;", r"\1, 0;"),
    "bytes of a copy": (r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), \d+;", r"\1, 4096;"),
    "an arrival": (r"@%p\d+ mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], \d+;", ""),
    "a count": (r"(mbarrier\.init\S* \[%r\d+\]), 1;", r"\1, 2;"),
    "an initialization": (r"@%p\d+ mbarrier\.init\S* \[%r\d+\], 1;", ""),
    "an end of a barrier": (r"@%p\d+ mbarrier\.inval\S* \[%r\d+\];", ""),
    "a copy": (r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", ""),
    "coordinates": (r"(cp\.async\.bulk\.tensor[^;]*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}"),
    "a wait for products": (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    "the last wait for products": (r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    "a fence": (r"fence\.proxy\.async\S*;", ""),
    "a wait for what was stored": (r"cp\.async\.bulk\.wait_group\S*\s+0;", "cp.async.bulk.wait_group 1;"),
}


def make_launch(k_major: bool, config: GemmConfig) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Return a launch of two reductions, the tensor for its result, and the expected result."""
    generator = torch.Generator().manual_seed(0)
    M, N, lengths = 130, 264, (320, 320)  # more steps than stages, twice

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    pairs = [(draw(M, k), draw(N, k) if k_major else draw(k, N)) for k in lengths]
    y = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    launch = tma_gemm.call_of([pairs], [y], [None], config, k_major, base=1)
    want = torch.zeros(M, N)
    for left, right in pairs:
        want += left.float() @ (right.float().mT if k_major else right.float())
    return launch, y, want


@pytest.mark.long
@pytest.mark.skipif(not environment.PTX, reason="mutates a compiled kernel: pytest --ptx sm_90")
@pytest.mark.parametrize("k_major", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("what", MUTATIONS)
def test_every_mutant_is_caught(what: str, k_major: bool, by_tma: GemmConfig, executor: Executor) -> None:
    launch, y, want = make_launch(k_major, by_tma)
    compiled = compile_launch(launch, executor.driver)
    pattern, replacement = MUTATIONS[what]

    def is_right(text: str) -> bool:
        y.fill_(torch.nan)
        try:
            execute(launch, replace(compiled, ptx=text), [list(range(launch.grid))])
        except KernelError:
            return False
        return torch.allclose(y.float(), want, rtol=0.02, atol=0.5)

    assert is_right(compiled.ptx)
    places = list(re.finditer(pattern, compiled.ptx))
    assert places
    for one in places:
        assert not is_right(compiled.ptx[: one.start()] + one.expand(replacement) + compiled.ptx[one.end() :])


@pytest.mark.skipif(not environment.PTX, reason="executes a compiled kernel: pytest --ptx sm_90")
@pytest.mark.parametrize("k_major", [True, False], ids=["forward", "backward"])
def test_it_waits_for_the_launch_that_it_overlaps(k_major: bool, by_tma: GemmConfig, executor: Executor) -> None:
    launch, _, _ = make_launch(k_major, by_tma)
    compiled = compile_launch(launch, executor.driver)
    late = launch.arguments["lefts"][0][1].base
    before = {late.untyped_storage().data_ptr()}
    execute(launch, compiled, [list(range(launch.grid))], before=before)
    without = replace(compiled, ptx=re.sub(r"griddepcontrol\.wait\s*;", "", compiled.ptx))
    assert without.ptx != compiled.ptx
    with pytest.raises(KernelError, match="what the launch before may still write"):
        execute(launch, without, [list(range(launch.grid))], before=before)
