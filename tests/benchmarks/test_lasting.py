"""What subspaces keep of a gradient, on matrices whose energies are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.research.paper import lasting
from lorasb.init.accumulator import LayerSum
from lorasb.init.svd import MomentSketch


@pytest.fixture
def bases() -> tuple[dict[str, torch.Tensor], dict[str, lasting.Bases]]:
    """A gradient [120, 100] of rank 8 from two samples, and every start's subspaces."""
    generator = torch.Generator().manual_seed(0)
    dy, x = torch.randn(2, 4, 120, generator=generator), torch.randn(2, 4, 100, generator=generator)
    layer_sum = LayerSum(sketch=MomentSketch((120, 100), 64, 0))
    layer_sum.add(dy, x)
    weight = torch.randn(120, 100, generator=generator)
    return {"layer": layer_sum.value()}, {"layer": lasting.bases_of(weight, layer_sum, 0)}


def test_what_is_kept_is_what_lies_inside(
    bases: tuple[dict[str, torch.Tensor], dict[str, lasting.Bases]],
) -> None:
    kept = {(line["start"], line["r"]): line["energy"] for line in lasting.energies(*bases)}
    assert kept["G", 16] == pytest.approx(1.0, abs=1e-5)
    assert kept["per-sample", 16] == pytest.approx(1.0, abs=1e-3)
    assert kept["random", 4] == pytest.approx(4 * 4 / (120 * 100), abs=5e-3)
    for start in lasting.STARTS.keys() - {lasting.AGAIN}:
        shares = [kept[start, r] for r in lasting.RANKS]
        assert all(0 <= less <= more + 1e-6 for less, more in zip(shares, [*shares[1:], 1.0], strict=True))


def test_bases_are_orthonormal(bases: tuple[dict[str, torch.Tensor], dict[str, lasting.Bases]]) -> None:
    for u, v in bases[1]["layer"].values():
        for side in (u, v):
            assert torch.allclose(side.t() @ side, torch.eye(64), atol=1e-4)


def test_the_table_has_a_row_a_start_and_rank() -> None:
    lines = [
        {"start": start, "r": str(r), "step": str(step), "energy": "0.5"}
        for start in lasting.STARTS
        for r in lasting.RANKS
        for step in lasting.STEPS
    ]
    rows = list(lasting.shown(lines))
    assert len(rows) == len(lasting.STARTS) * len(lasting.RANKS)
    assert all(len(row) == len(lasting.HEAD) for row in rows)
