"""One call of the op, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
from tolerances import POOL
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear
from lorasb.ops.adapted_linear import DENSE, Operands


def operands_of(
    *cases: reference.Case, base: Any = None, row_index: Tensor | None = None, dropout: float = 0.0, seeds: Any = None
) -> Operands:
    """The operands of one case or several, as the op has them; `base`: (tensors, layout), or () for no base."""
    tensors, layout = ([case.weight for case in cases], DENSE) if base is None else (base or ([], DENSE))
    biases = [case.bias for case in cases if case.bias is not None]
    lists = [[getattr(case, name) for case in cases] for name in ("a", "core", "b")]
    return Operands(tensors, layout, *lists, biases, [c.scaling for c in cases], row_index, dropout, seeds)


def opcheck(backend: str, operands: Operands, *cases: reference.Case) -> None:
    """torch's own tests of the op and its backward op, of a backend."""
    x, suffix = cases[0].x, "" if backend == "auto" else f"_{backend}"
    torch.library.opcheck(getattr(torch.ops.lorasb, f"adapted_linear{suffix}").default, (x, *operands))
    plain = Operands(
        *([t.detach() for t in f] if isinstance(f, list) and f and isinstance(f[0], Tensor) else f for f in operands)
    )
    if len(cases) == 1 and not (plain.is_quantized or plain.row_index is not None or plain.dropout):
        base, biases = (list(one) or [None] for one in (plain.base, plain.biases))
        arguments = x.detach(), base[0], plain.a[0], plain.cores[0], plain.b[0], biases[0], plain.scalings[0]
        torch.library.opcheck(getattr(torch.ops.lorasb, f"serve_dense{suffix}").default, arguments)
    us = [x.detach().reshape(-1, x.shape[-1]) @ case.a.t() for case in cases]
    op = getattr(torch.ops.lorasb, f"adapted_linear_backward{suffix}").default
    for need_dx, need_dcores in ((True, True), (True, False), (False, True)):
        arguments = [case.dy for case in cases], us, *plain._replace(biases=[]), need_dx, need_dcores
        # it is the derivative: it has none of its own
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def run(case: reference.Case, x: Tensor | None = None, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dR of the op."""
    x = (case.x.clone() if x is None else x).requires_grad_(True)
    core = case.core.clone().requires_grad_(True)
    y = lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling, dropout=dropout)
    y.backward(case.dy)
    assert x.grad is not None
    assert core.grad is not None
    return y.detach(), x.grad, core.grad


def pooled(rows: int, n: int, m: int, r: int, dtype: torch.dtype, **options: object) -> list[tuple[Tensor, ...]]:
    """y, dx and dR: ours, the plain chain's in the same dtype, and exact ones; over as many seeds as a comparison needs."""
    pools: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for seed in range(-(-POOL // min(rows * n, rows * m, r * r))):
        case = reference.make_case((rows,), n, m, r, dtype, seed=seed, **options)  # type: ignore[arg-type]
        exact = case.double()
        wanted = (reference.forward(exact), *reference.gradients(exact))
        for pool, *values in zip(pools, run(case), reference.plain_chain(case), wanted, strict=True):
            pool.append(tuple(value.reshape(-1) for value in values))
    return [tuple(torch.cat(part) for part in zip(*pool, strict=True)) for pool in pools]


def run_kernels(case: reference.Case, dropout: float = 0.0, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dR by the kernels."""
    with lorasb.backend("triton"):
        return run(case, x, dropout)


def check_dropout_follows_the_global_seed(run: Callable[..., Any], case: reference.Case) -> None:
    """The same seed gives the same y, dx and dR to the bit; another one, others. `run`: one of the two above."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(case, dropout=0.5))
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
