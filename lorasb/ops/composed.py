"""The adapted linear composed of torch's own operations: where that is faster, and for derivatives beyond the first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

# Bytes of x below which torch's own ops are faster than our autograd function, whose Python overhead in backward then
# takes longer than the pass over dx that it saves. Measured with 4096 features and 512
# tokens: bf16 (4 MiB) is below the crossover, fp32 (8 MiB) above.
SMALL_BYTES = 6 * 2**20


def is_small(x: Tensor, frozen: Iterable[Tensor]) -> bool:
    """True if a call is faster composed of torch's own ops than by our autograd function, with the same results."""
    if x.dtype == torch.float16:  # dR sums over all tokens in x's dtype, which overflows in fp16
        return False
    if torch.is_autocast_enabled("cpu"):  # autocast would cast the product with R, too
        return False
    if not torch.is_grad_enabled():
        return True
    for tensor in frozen:
        if tensor.requires_grad:  # the op gives W, A, B, bias no gradients
            return False
    return x.numel() * x.element_size() < SMALL_BYTES


def composed(
    x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = x Wᵀ + bias, then s·x Aᵀ Rᵀ Bᵀ accumulated onto it; autograd saves u = x Aᵀ [M, r] but not x."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scaled = core if scaling == 1.0 else core * scaling
    v = functional.linear(functional.linear(rows, a), scaled.to(x.dtype))
    # In place: linear saves its inputs and not its result, so overwriting that does not invalidate the graph.
    y = functional.linear(v, b, bias) if weight is None else functional.linear(rows, weight, bias).addmm_(v, b.t())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[0])


def transformed(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    index: Tensor | None = None,
) -> Tensor:
    """y by out-of-place torch operations, which have every derivative, forward mode and `vmap`."""
    with torch.autocast(x.device.type, enabled=False):
        a, b = a.detach(), b.detach()  # frozen, as for the ops
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        u = functional.linear(functional.dropout(x, dropout), a).to(core.dtype)  # so that dR does not overflow in fp16
        if index is None:
            v = functional.linear(u, core * scaling)
        else:
            chosen = core.index_select(0, index.clamp(min=0).to(core.device)) * scaling
            chosen = chosen * (index >= 0).to(core)[:, None, None]
            v = (u.reshape(len(index), -1, u.shape[-1]) @ chosen.mT).reshape(u.shape)
        y = functional.linear(v.to(x.dtype), b, bias)
        return y if weight is None else y + functional.linear(x, weight)
