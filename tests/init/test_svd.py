"""Signs as bits; truncated SVDs of dense and of packed matrices: optimal energy, orthonormal factors, equal results."""

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb.init import svd
from lorasb.init.accumulator import LayerSum
from lorasb.init.svd import SignBits, truncated_svd


def signs_of(matrix: torch.Tensor) -> SignBits:
    total = LayerSum()
    total.add_gradient(matrix)
    return total.signs().bits


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 64), (40, 300), (500, 500)])
@pytest.mark.parametrize("kind", ["signs", "decaying", "noise"])
def test_svd_captures_the_optimal_energy(shape: tuple[int, int], kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 8, generator=g) @ torch.randn(8, shape[1], generator=g)
    matrix = matrix + 2.0 * torch.randn(shape, generator=g)
    if kind == "signs":
        matrix = torch.sign(matrix)
    elif kind == "decaying":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(s * 0.8 ** torch.arange(len(s))) @ vt
    energies = torch.linalg.svdvals(matrix.double()).square()
    for r in (1, 16, min(32, *shape), min(shape)):
        u, s, vt = truncated_svd(matrix, r, seed=0)
        inside = (u.double().t() @ matrix.double() @ vt.double().t()).square().sum()
        assert inside / energies[:r].sum() >= tolerances.ENERGY
        tolerances.check(u.t() @ u, torch.eye(r), tolerances.ORTHONORMAL)
        tolerances.check(vt @ vt.t(), torch.eye(r), tolerances.ORTHONORMAL)
        assert (s[:-1] >= s[1:] - 1e-4 * s[0]).all()
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_factoring_takes_fp32_as_it_is_and_gives_the_callers_choice_back() -> None:
    chosen = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with svd.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(chosen)


@pytest.mark.parametrize("shape", [(300, 200), (200, 333), (70, 70), (1, 5), (64, 2050), (500, 500)])
@pytest.mark.parametrize("zeros", [False, True])
def test_bits_give_the_svd_of_the_signs(shape: tuple[int, int], zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size are unpacked; for the last shape, iterations use the matrix itself, not its Gram matrix."""
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=g)
    if zeros:
        matrix[torch.rand(shape, generator=g) < 0.1] = 0
    bits, r = signs_of(matrix), min(8, *shape)
    monkeypatch.setattr(svd, "BLOCK", 64 * min(shape))
    found, dense = truncated_svd(bits, r, seed=1), truncated_svd(torch.sign(matrix), r, seed=1)
    core = svd.signed_core(bits, found)
    want = found.u.double().t() @ torch.sign(matrix).double() @ found.vt.double().t()
    tolerances.check(core, want, tolerances.fp32(max(shape)))
    assert found.s.square().sum() >= tolerances.ENERGY * dense.s.square().sum()


@given(m=st.integers(1, 9), n=st.integers(1, 70), zeros=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_and_unpacking_is_the_sign(m: int, n: int, zeros: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=g)
    if zeros:
        matrix[torch.rand(m, n, generator=g) < 0.3] = 0.0
    bits = signs_of(matrix)
    assert torch.equal(bits.unpack(), torch.sign(matrix))
    assert (bits.nonzero is None) == (not bool((matrix == 0).any()))
    assert bits.words.shape == (m, -(-n // 32))
