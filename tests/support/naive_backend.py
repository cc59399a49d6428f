"""A naive backend: one table of products, in fp64 and row by row. It passes the tests of the ops."""

import torch
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
    out = torch.zeros_like(left)
    tokens = len(left) // max(1, len(index))
    for i, k in enumerate(index.tolist()):
        own = slice(i * tokens, (i + 1) * tokens)
        if k >= 0:
            out[own] = core(left[own], r[k], None, scale, transposed)
    return out


def extended(rows: Tensor, base: Base, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    y = rows.double() @ dense(base, rows, (b.shape[0], rows.shape[1])).t() + v.double() @ b.double().t()
    return (y if bias is None else y + bias.double()).to(rows)


def extended_transposed(rows: Tensor, base: Base, w: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    dx = rows.double() @ dense(base, rows, (rows.shape[1], a.shape[1])) + w.double() @ a.double()
    return (dx if onto is None else onto.double() + dx).to(rows)


NAIVE = Products(thin, core, extended, extended_transposed)
