"""A backend is one table of products: a naive one, in fp64 and row by row, computes every kind of call."""

from __future__ import annotations

import pytest
import tolerances
import torch
from calls import KINDS, MASKED, make_call, operands_of
from torch import Tensor

from lorasb.backends import eager
from lorasb.backends.eager import Base, Products


def dense(base: Base, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """W, or zeros where there is none."""
    found = eager.dense(base, *shape, like.dtype)
    return torch.zeros(shape, dtype=torch.float64) if found is None else found.double()


def thin(rows: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    return torch.einsum("ik,jk->ij" if transposed else "ik,kj->ij", rows.double(), factor.double()).to(rows)


def core(left: Tensor, r: Tensor, index: Tensor | None, scale: float, transposed: bool) -> Tensor:
    if index is None:
        return thin(left, r.double() * scale, transposed).to(left)
    eager.check_index(index, len(r))
    parts = zip(index.tolist(), left.view(len(index), -1, left.shape[1]), strict=True)
    return torch.cat(
        [core(part, r[k] if k >= 0 else torch.zeros_like(r[0]), None, scale, transposed) for k, part in parts]
    )


def extended(rows: Tensor, base: Base, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    y = rows.double() @ dense(base, rows, (b.shape[0], rows.shape[1])).t() + v.double() @ b.double().t()
    return (y if bias is None else y + bias.double()).to(rows)


def extended_transposed(rows: Tensor, base: Base, w: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    dx = rows.double() @ dense(base, rows, (rows.shape[1], a.shape[1])) + w.double() @ a.double()
    return (dx if onto is None else onto.double() + dx).to(rows)


NAIVE = Products(thin, core, extended, extended_transposed)


@pytest.mark.parametrize("kind", [*KINDS, *MASKED])
def test_a_table_of_products_is_a_backend(kind: str) -> None:
    cases, options = make_call(kind, torch.float32)
    if kind in MASKED:
        options["seeds"] = torch.arange(7, 7 + len(cases))
    operands, x, dys = operands_of(*cases, **options), cases[0].x, [case.dy for case in cases]
    found, want = (eager.forward(table, x, operands) for table in (NAIVE, eager.EAGER))
    us = want[len(cases) :]
    found += eager.backward(NAIVE, dys, us, operands, True, True)
    want = [*want, *eager.eager_backward(dys, us, operands, True, True)]
    assert len(found) == len(want) == 3 * len(cases) + 1
    tolerances.check(found, want, tolerances.fp32(200))
