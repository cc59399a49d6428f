"""The eager backend: every op in plain torch for any device; the adapted linear is built from a table of products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.adapted_linear import register_backend
from ..ops.calls import Member, Operands, no_autocast
from ..ops.registry import pack_words, words_of

# Bytes of x below which torch's own ops are faster than our autograd function, whose Python overhead in backward then
# takes longer than the pass over dx that it saves. Measured with 4096 features and 512
# tokens: bf16 (4 MiB) is below the crossover, fp32 (8 MiB) above.
SMALL_BYTES = 6 * 2**20
Base = Tensor | tuple[list[Tensor], list[int]] | None  # `base` of a `Member`


class Products(NamedTuple):
    """A backend's matrix products, from which it computes every kind of adapted linear."""

    # (rows [M, k], factor, transposed) -> rows factorᵀ, or rows factor, in rows' dtype or wider
    thin: Callable[[Tensor, Tensor, bool], Tensor]
    # (left [M, r], R [r, r], None, scale, transposed) -> s·left Rᵀ, or s·left R;
    # (left, stack [K, r, r], index [k] of each row's R, scale, transposed) -> s·left_i R_kᵀ, or s·left_i R_k
    core: Callable[[Tensor, Tensor, Tensor | None, float, bool], Tensor]
    # (rows [M, n], base, v [M, r], B [m, r], bias) -> x Wᵀ + v Bᵀ + bias
    extended: Callable[[Tensor, Base, Tensor, Tensor, Tensor | None], Tensor]
    # (rows [M, m], base, w [M, r], A [r, n], onto) -> dy W + w A, in place onto `onto` if given
    extended_transposed: Callable[[Tensor, Base, Tensor, Tensor, Tensor | None], Tensor]


def forward(products: Products, x: Tensor, operands: Operands) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j = x A_jᵀ [M, r]."""
    ys, us = [], []
    with no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        for one in operands.members():
            source = rows
            if one.seed is not None:
                source = rows * keep_mask(rows.shape, operands.dropout, one.seed, x.device)
            u = products.thin(source, one.a, True)
            v = products.core(u, one.core, operands.row_index, _scale(one, operands), True)
            ys.append(shaped(products.extended(rows, one.base, v, one.b, one.bias), x))
            us.append(u if u.dtype == x.dtype else u.to(x.dtype))
    return ys + us


def backward(
    products: Products, dys: list[Tensor], us: list[Tensor], operands: Operands, need_dx: bool, need_dcores: bool
) -> list[Tensor]:
    """dx = Σ_j dy_j W_j + w_j A_j with t_j = dy_j B_j, w_j = s_j·t_j R_j, then dR_j = s_j·t_jᵀ u_j; unneeded: empty."""
    dx: Tensor | None = None  # one for all members: autograd would write one for each and add them up
    dcores = []
    with no_autocast(dys[0]):
        for dy, u, one in zip(dys, us, operands.members(), strict=True):
            rows = dy.reshape(-1, dy.shape[-1])
            t = products.thin(rows, one.b, False)
            given = one.core, operands.row_index, _scale(one, operands)
            dcores.append(core_gradient(t, u, *given) if need_dcores else one.core.new_empty((0,)))
            if not need_dx:
                continue
            w = products.core(t, *given, False)
            if one.seed is None:
                dx = products.extended_transposed(rows, one.base, w, one.a, dx)
            else:
                part = _masked_dx(products, rows, w, one, operands.dropout)
                dx = part if dx is None else dx.add_(part)
        return [dys[0].new_empty((0,)) if dx is None else shaped(dx, dys[0]), *dcores]


def _scale(one: Member, operands: Operands) -> float:
    if one.seed is None:  # inverted dropout: no scaling in evaluation
        return one.scaling
    dropout = kernel_dropout(operands.dropout) if getattr(_masks, "philox", False) else operands.dropout
    return one.scaling / (1.0 - dropout)


def _masked_dx(products: Products, rows: Tensor, w: Tensor, one: Member, dropout: float) -> Tensor:
    """dy W + mask ∘ (w A): the mask applies to the adapter's part alone, so that is computed first."""
    part, seed = products.thin(w, one.a, False), cast(Tensor, one.seed)
    part = part if part.dtype == rows.dtype else part.to(rows.dtype)
    part.mul_(keep_mask(part.shape, dropout, seed, rows.device))
    weight = dense(one.base, rows.shape[1], one.a.shape[1], rows.dtype)
    return part if weight is None else part.addmm_(rows, weight)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [M, n] reshaped to the leading dimensions of `like`."""
    # It shares the memory but is no view to autograd: callers could not modify a real view of an op's result in place.
    return torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def dense(base: Base, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """W [rows, columns], dequantized for this call if it is quantized; None for an adapter alone."""
    return dequantize(*base, rows, columns, dtype) if isinstance(base, tuple) else base


def thin(rows: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    return rows @ (factor.t() if transposed else factor)


def times_core(left: Tensor, core: Tensor, index: Tensor | None, scale: float, transposed: bool) -> Tensor:
    """s·left Rᵀ, or s·left R, in left's dtype; with an index each row has its own R, and k = -1 gives zeros."""
    if index is not None:
        check_index(index, len(core))
        if len(index) == 0 or len(left) == 0 or len(core) == 0:
            return torch.zeros_like(left)
        core = core.index_select(0, index.clamp(min=0).to(core.device))
    # the scaled R is rounded first, as the GEMM takes one dtype
    chosen = (core if scale == 1.0 else core * scale).to(left.dtype)
    chosen = chosen.mT if transposed else chosen
    if index is None:
        return left @ chosen
    product = torch.bmm(left.view(len(index), -1, left.shape[1]), chosen)
    if bool((index < 0).any()):
        product[(index < 0).to(left.device)] = 0.0
    return product.view_as(left)


def check_index(index: Tensor, count: int) -> None:
    """Raise an IndexError for an index [k] outside of [-1, count)."""
    if index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < -1 or high >= count:
        raise IndexError(f"expected index in [-1, {count}), -1 for no adapter, got {low if low < -1 else high}")


def extended(rows: Tensor, base: Base, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + v Bᵀ + bias."""
    weight = dense(base, b.shape[0], rows.shape[1], rows.dtype)
    if weight is None:
        return v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
    y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return y.addmm_(v, b.t())


def extended_transposed(rows: Tensor, base: Base, w: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    """dy W + w A, in place onto `onto` if given."""
    weight = dense(base, rows.shape[1], a.shape[1], rows.dtype)
    if weight is None:
        return w @ a if onto is None else onto.addmm_(w, a)
    return (rows @ weight if onto is None else onto.addmm_(rows, weight)).addmm_(w, a)


def core_gradient(t: Tensor, u: Tensor, core: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """dR = s·tᵀ u [r, r] in R's dtype; with an index each dR_k of [K, r, r] sums over its own rows."""
    if index is None:
        return _core_gradient(t, u, core, scale)
    gradients = t.new_zeros(core.shape, dtype=core.dtype)  # like t, so that both are batched under `is_grads_batched`
    order = index.argsort(stable=True)[int((index < 0).sum()) :]  # rows sorted by adapter, without rows that have none
    if len(order) == 0:
        return gradients
    present, counts = index[order].unique_consecutive(return_counts=True)
    rows = order.to(t.device)
    t_rows, u_rows = (one.view(len(index), -1, one.shape[1]).index_select(0, rows) for one in (t, u))
    if bool((counts == counts[0]).all()):  # one batched product if all adapters have equally many rows
        t_rows, u_rows = (one.reshape(len(present), -1, one.shape[2]) for one in (t_rows, u_rows))
        gradients[present.to(t.device)] = _core_gradient(t_rows, u_rows, core, scale)
        return gradients
    for k, t_k, u_k in zip(present.tolist(), t_rows.split(counts.tolist()), u_rows.split(counts.tolist()), strict=True):
        gradients[k] = _core_gradient(t_k.reshape(-1, t.shape[1]), u_k.reshape(-1, t.shape[1]), core, scale)
    return gradients


def _core_gradient(t: Tensor, u: Tensor, core: Tensor, scale: float) -> Tensor:
    """s·tᵀ u of one R, or of several at once, t and u [K, M, r]."""
    # In bf16 the GEMM sums in fp32 and rounds once, as autograd would. In fp16 the sum over all tokens could overflow.
    in_bf16 = t.dtype == torch.bfloat16
    dcore = (t.mT @ u).to(core.dtype) if in_bf16 else t.to(core.dtype).mT @ u.to(core.dtype)
    return dcore if scale == 1.0 else dcore.mul_(scale)


_masks = threading.local()  # `philox` is set while eager computes in place of a Triton kernel


@contextmanager
def kernel_masks() -> Iterator[None]:
    """Use the Triton kernels' dropout mask inside the block: for a fallback when a kernel ran the other direction."""
    _masks.philox = True
    try:
        yield
    finally:
        _masks.philox = False


def kernel_dropout(dropout: float) -> float:
    """The probability of the kernels' masks: the nearest multiple of 2^-16, strictly between 0 and 1."""
    if not 0.0 < dropout < 1.0:
        return dropout
    return min(max(round(dropout * 2**16), 1), 2**16 - 1) / 2**16


def philox_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """The Triton kernels' mask [M, n] by Philox-4x32-10: True where 16 random bits are at least dropout·2^16."""
    # 32-bit words in int64. Counter (column // 8, row, 0, 0) gives eight columns a half word each, lower halves first.
    low, (M, n) = 0xFFFFFFFF, shape
    c0 = torch.arange(-(-n // 8), device=device).expand(M, -1)
    c1 = torch.arange(M, device=device)[:, None].expand(c0.shape)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps, but keeps all 64 bits; `>> 32` is the high word
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(M, 8 * c0.shape[1])[:, :n]
    return halves >= kernel_dropout(dropout) * 2**16


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """The mask [M, n] of the elements that dropout keeps."""
    if getattr(_masks, "philox", False):
        return philox_mask(shape, dropout, int(seed), device)
    # A separate generator: only the draw of the seed advances the global random state.
    generator = torch.Generator(device=device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)


CHUNK = 1 << 20  # elements dequantized at a time: 4 MB in fp32
ROUNDINGS = (None, torch.bfloat16, torch.float16)  # by the code in `layout`
INT8_SCALE = 7.874015718698502e-3  # 1 / 127, with the digits of bitsandbytes' constant


def dequantize(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns]: table[nibble]·absmax in fp32, rounded as `layout` says."""
    rounding = ROUNDINGS[layout[2]]
    if len(quant) == 2:  # 8 bits
        codes, scales = quant
        wide = codes.view(rows, columns).float() * scales.view(-1, 1) * INT8_SCALE
        return wide.to(rounding).to(dtype) if rounding is not None else wide.to(dtype)
    octets, table, block = quant[0], quant[2], layout[0]
    if block < 1:
        raise ValueError(f"expected blocks of at least one weight, got {block}")
    # [256, 2]: the values of a byte's high and low nibble, so that one look-up decodes both.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)
    scales, count = block_scales(quant, layout), rows * columns
    out = torch.empty(count, dtype=dtype, device=octets.device)
    step = max(block, CHUNK // block * block)  # whole blocks, which start at a byte
    for first in range(0, count, step):
        last = min(first + step, count)
        values = functional.embedding(octets[first // 2 : (last + 1) // 2].int(), pairs).flatten()
        values = functional.pad(values, (0, -len(values) % block)).view(-1, block)  # the last may be partial
        scale = scales[first // block : first // block + len(values)]
        wide = (values * scale[:, None]).flatten()[: last - first]
        out[first:last] = wide if rounding is None else wide.to(rounding)
    return out.view(rows, columns)


def block_scales(quant: list[Tensor], layout: list[int]) -> Tensor:
    """The fp32 scale of each block: absmax, or table2[absmax8]·absmax2 + offset."""
    if len(quant) == 3:  # 4 bits, without nested statistics
        return quant[1]
    _, octets, _, absmax, table, offset = quant
    scales = functional.embedding(octets.int(), table[:, None]).flatten()
    # rounded separately, as in bitsandbytes: a fused multiply-add would differ in the last bit
    scales = scales * absmax.repeat_interleave(layout[1])[: len(scales)]
    return scales + offset


BLOCK = 1 << 18  # elements of G per block of rows: 1 MB in fp32


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] += dyᵀ x, in total's dtype; with `fresh`, its former contents are ignored."""
    with no_autocast(x):
        left, right = dy.to(total.dtype), x.to(total.dtype)
        for rows in _row_blocks(total.shape):
            _sum_rows(left, right, total, rows, fresh)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and statistics of G = total + dyᵀ x (of dyᵀ x alone if `fresh`), which overwrites `total` [m, n] if given.

    Returns:
        The bits G > 0 and G != 0, as words [m, ceil(n / 32)] int32; and [Σ G², zeros, NaN or Inf entries] in fp64.
    """
    wide = total.dtype if total is not None else torch.float64 if x.dtype == torch.float64 else torch.float32
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    nonzero, counts = torch.empty_like(words), torch.zeros(3, dtype=torch.float64, device=x.device)
    with no_autocast(x):
        left, right = dy.to(wide), x.to(wide)
        for rows in _row_blocks((dy.shape[1], x.shape[1])):
            block = _sum_rows(left, right, total, rows, fresh)
            words[rows], nonzero[rows] = pack_words(block > 0), pack_words(block != 0)
            squares = torch.linalg.vector_norm(block, dtype=torch.float64).square()  # without an fp64 copy of the block
            counts += torch.stack((squares, (block == 0).sum(), (~block.isfinite()).sum())).double()
    return words, nonzero, counts


def _row_blocks(shape: tuple[int, ...] | torch.Size) -> Iterator[slice]:
    step = max(32, BLOCK // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _sum_rows(left: Tensor, right: Tensor, total: Tensor | None, rows: slice, fresh: bool) -> Tensor:
    """Return some rows of G: if `total` is given, update it and return a view of it."""
    product = left[:, rows].t() @ right
    if total is None:
        return product
    block = total[rows]
    return block.copy_(product) if fresh else block.add_(product)


def composed(x: Tensor, lists: Sequence[Sequence[Tensor]], scalings: Sequence[float]) -> list[Tensor] | None:
    """The y_j of a small dense call by torch's own ops; None where our autograd function is faster or has to run.

    y_j = x W_jᵀ + bias_j, then s_j·x A_jᵀ R_jᵀ B_jᵀ accumulated onto it; autograd saves u_j = x A_jᵀ [M, r] but not x.
    lists: W, A, R, B and biases of the members; W and biases may be empty.
    """
    # In fp16 dR, which sums over all tokens in x's dtype, overflows; autocast would cast the product with R, too.
    if x.dtype == torch.float16 or torch.is_autocast_enabled("cpu"):
        return None
    weights, a, cores, b, biases = lists
    if torch.is_grad_enabled():
        if x.numel() * x.element_size() >= SMALL_BYTES:
            return None
        for tensor in (*weights, *a, *b, *biases):
            if tensor.requires_grad:  # the op gives W, A, B, bias no gradients
                return None
    ys = []
    for j, core in enumerate(cores):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # a view per member: dx is summed member by member
        scaled = core if scalings[j] == 1.0 else core * scalings[j]
        v, bias = functional.linear(functional.linear(rows, a[j]), scaled.to(x.dtype)), biases[j] if biases else None
        if weights:
            # In place: linear saves its inputs and not its result, so overwriting that does not invalidate the graph.
            y = functional.linear(rows, weights[j], bias).addmm_(v, b[j].t())
        else:
            y = functional.linear(v, b[j], bias)
        ys.append(y if x.dim() == 2 else y.view(*x.shape[:-1], b[j].shape[0]))
    return ys


def chosen_cores(stack: Tensor, index: Tensor) -> Tensor:
    """The R [n, r, r] of each of n rows from a stack [K, r, r]; zeros where a row has none."""
    if not len(stack):
        return stack.new_zeros(len(index), *stack.shape[1:])
    index = index.to(stack.device)
    return torch.where((index >= 0)[:, None, None], stack.index_select(0, index.clamp(min=0)), 0.0)


def transformed(x: Tensor, one: Member, dropout: float, index: Tensor | None) -> Tensor:
    """Return y over a dense W by out-of-place torch operations, with all derivatives, forward mode and `vmap`."""
    core, base = one.core, cast("Tensor | None", one.base)
    with torch.autocast(x.device.type, enabled=False):
        a, b = one.a.detach(), one.b.detach()  # frozen, as for the ops
        weight, bias = (None if t is None else t.detach() for t in (base, one.bias))
        u = functional.linear(functional.dropout(x, dropout), a).to(core.dtype)  # so that dR does not overflow in fp16
        if index is None:
            v = functional.linear(u, core * one.scaling)
        else:
            chosen = chosen_cores(core, index) * one.scaling
            v = (u.reshape(len(index), u.shape[1:-1].numel(), u.shape[-1]) @ chosen.mT).reshape(u.shape)
        y = functional.linear(v.to(x.dtype), b, bias)
        return y if weight is None else y + functional.linear(x, weight)


EAGER = Products(thin, times_core, extended, extended_transposed)
eager_forward, eager_backward = partial(forward, EAGER), partial(backward, EAGER)
PLAIN_OPS = {one.__name__: one for one in (dequantize, gradient_add, gradient_signs)}


def register() -> None:
    """Register for every device; CompositeExplicitAutograd leaves autograd to the op's own formula."""
    register_backend(("eager", "auto"), ("CompositeExplicitAutograd",), eager_forward, eager_backward, PLAIN_OPS)
