"""update="per-sample": subspaces from the second moments of every sample's own gradient, sketched in one pass."""

import pytest
import tolerances
import torch
from adapters import layers
from gradients import autograd_sums, factors
from models import batches_for, make, started
from torch import Tensor

import lorasb
from lorasb.distributed.process_group import Processes
from lorasb.init.svd import MomentSketch, leading_eigenvectors
from lorasb.init.task import InitOptions, Work


def captured_share(moment: Tensor, basis: Tensor) -> float:
    """Share of a moment's trace that a basis [n, r] captures, relative to the best r columns."""
    best = torch.linalg.eigvalsh(moment).flip(0)[: basis.shape[1]].sum()
    return float((basis.t() @ moment @ basis).trace() / best)


def test_factors_lead_the_moments_of_all_samples() -> None:
    model, report = started(update="per-sample")
    assert report.update == "per-sample"
    samples = [{key: value[i : i + 1] for key, value in b.items()} for b in batches_for("llama") for i in range(2)]
    gradients = [autograd_sums(make("llama").double(), [sample]) for sample in samples]
    reported = {layer.name: torch.tensor(layer.singular_values).double() for layer in report.layers}
    for name, layer in layers(model).items():
        own = [of_sample[name] for of_sample in gradients]
        values = torch.linalg.eigvalsh(sum(g @ g.t() for g in own)).flip(0)[:4].sqrt()
        # estimated from a sketch with 36 of 64 columns: up to a few percent below the eigenvalues
        assert torch.allclose(reported[name], values, rtol=0.05)
        a, core, b = (getattr(layer, f"lorasb_{part}")["default"].detach().double() for part in "ARB")
        for basis, moment in ((b, sum(g @ g.t() for g in own)), (a.t(), sum(g.t() @ g for g in own))):
            tolerances.check(basis.t() @ basis, torch.eye(4), tolerances.ORTHONORMAL)
            assert captured_share(moment, basis) > 0.99  # 36 of 64 columns represent all, see the sketch's test below
        step = -1e-3 * (b.t() @ sum(own).sign() @ a.t())
        share = min(1.0, 4.0 * 4 * 1e-3 / float(step.norm()))
        tolerances.check(core, step * share, tolerances.FACTORS)


def test_the_strategies_and_a_second_run_agree_to_the_bit() -> None:
    """There is one sketch per layer, whatever else is differentiated at the same time."""
    strategies = ("layerwise", "layerwise", "accumulate")
    first, second, third = (factors(started(update="per-sample", strategy=strategy)[0]) for strategy in strategies)
    tolerances.check_equal(first, second)
    tolerances.check_equal(first, third)


def test_a_sketch_of_few_columns_keeps_what_the_eigenvectors_keep() -> None:
    """36 of 300 and of 200 columns; the spectrum falls like 1/k, as with real gradients."""
    generator = torch.Generator().manual_seed(0)
    sketch, gradients = MomentSketch((300, 200), 4, seed=1), []
    mix = [torch.randn(side, side, generator=generator) / torch.arange(1, side + 1) for side in (300, 200)]
    for _ in range(12):
        dy, x = (torch.randn(2, 7, len(m), generator=generator) @ m.t() for m in mix)
        sketch.add(dy, x)
        gradients += [(left.t() @ right).double() for left, right in zip(dy, x, strict=True)]
    u, s, vt = sketch.triplets().first(4)
    assert captured_share(sum(g @ g.t() for g in gradients), u.double()) > 0.99
    assert captured_share(sum(g.t() @ g for g in gradients), vt.t().double()) > 0.99
    assert (s.diff() <= 0).all()


def test_moments_of_low_rank_are_completed() -> None:
    """With one token, every g has rank 1; B and A are orthonormal nonetheless."""
    sketch = MomentSketch((64, 48), 8, seed=0)
    dy, x = torch.randn(1, 1, 64), torch.randn(1, 1, 48)
    sketch.add(dy, x)
    u, _, vt = sketch.triplets().first(8)
    tolerances.check(u.t() @ u, torch.eye(8), tolerances.ORTHONORMAL)
    tolerances.check(vt @ vt.t(), torch.eye(8), tolerances.ORTHONORMAL)
    assert abs(float(u[:, 0] @ dy[0, 0] / dy.norm())) > 1 - 1e-5
    assert abs(float(vt[0] @ x[0, 0] / x.norm())) > 1 - 1e-5


def test_the_eigenvectors_of_a_full_sketch_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    moment, start = root @ root.t(), torch.randn(20, 20, generator=generator, dtype=torch.float64)
    basis, values = leading_eigenvectors((moment @ start).float(), start.float())
    want = torch.linalg.eigvalsh(moment).flip(0)
    tolerances.check_scaled(values, want, tolerances.FACTORS)
    assert captured_share(moment, basis[:, :5].double()) > 1 - 1e-5


def test_rows_without_samples_count_as_one() -> None:
    """They are [tokens, features], as in OPT's fc1 and in experts."""
    dy, x = torch.randn(6, 10), torch.randn(6, 8)
    flat, one = (MomentSketch((10, 8), 2, seed=0) for _ in range(2))
    flat.add(dy, x)
    one.add(dy[None], x[None])
    tolerances.check_equal(flat.sums, one.sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model = lorasb.patch(make("llama"), r=4)
    torch.set_default_dtype(dtype)
    try:
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, update="per-sample", progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.isfinite().all() for value in factors(model).values())


def test_sketches_count_in_the_plan() -> None:
    """Each ΣG comes with two sums and two starts of 4 + 32 columns in fp32."""
    model = lorasb.patch(make("llama"), r=4)
    for update, columns in (("adamw", 0), ("per-sample", 36)):
        work = Work(model, layers(model), [], InitOptions(adapter="default", update=update), Processes())
        for layer in work.layers.values():
            m, n = layer.base.shape
            assert work.sum_bytes(layer) == 4 * (m * n + 2 * (m + n) * min(columns, m, n))
