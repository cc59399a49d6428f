"""A table of products defines a backend: with a naive one, all kinds of calls, dropout included, match eager torch."""

from __future__ import annotations

import pytest
import tolerances
import torch
from calls import KINDS, MASKED, make_call, operands_of
from naive_backend import NAIVE

from lorasb.backends import eager


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
