"""Rows of a batch with adapters of their own: those on one basis in one call, others one after the other.

Adapters share a basis if their A and B are the same tensors. Their R's are stacked, [K, r, r]: those of PEFT's adapters
for the call, those of a bank (`AdapterBank`) where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..constants import FROZEN_FACTORS
from ..functional import lora_sb_linear
from ..ops.autocast import autocast_on
from .initialized import guarded_core
from .token_rows import MERGED_ROWS, Rows, other_length

if TYPE_CHECKING:
    from .linear import LoRASBLinear


class StoredCores(Protocol):
    """R's of many adapters on the basis of one of the layer's: a layer's part of an `AdapterBank`."""

    basis: str
    bank: Any

    def stack(self) -> Tensor:
        """[capacity, r, r], by slot."""


class RowCores(NamedTuple):
    """Operands of `lora_sb_linear` for rows with adapters on one basis.

    Attributes:
        a, b: A [r, in] and B [out, r].
        cores: [K, r, r].
        places: [n], int64 on the CPU: each row's R, or -1.
        scaling: s.
    """

    a: Tensor
    b: Tensor
    cores: Tensor
    places: Tensor
    scaling: float


def forward(layer: LoRASBLinear, x: Tensor, rows: Rows | Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """y [..., out] of a linear with a choice of adapter for each row of x.

    Raises:
        ValueError: not one name for each row, or an adapter is merged into the weight.
    """
    rows = rows if isinstance(rows, Rows) else Rows.of(rows)
    if len(rows) != x.shape[0]:
        raise ValueError(other_length(x.shape[0], len(rows)))
    if layer.merged:
        raise ValueError(MERGED_ROWS)
    if in_one_call(layer, rows) is not None and not (args or kwargs or layer.any_wide or layer.base_must_run()):
        taken = layer.siblings.take(layer, x, rows) if layer.siblings is not None else None
        if taken is None:
            return _computed(layer, x, of_rows(layer, rows), fused=True)
        return taken if autocast_on(x.device.type) else taken.to(x.dtype)
    parts, names = _parts(layer, rows)
    y = layer.base_forward(x, *args, **kwargs)
    for part in parts:
        y = y + _computed(layer, x, part).to(y.dtype)
    return _add_one_by_one(layer, y, x, names, rows)


def in_one_call(layer: LoRASBLinear, rows: Rows) -> tuple[str, ...] | None:
    """The adapters of rows that one call computes, of a bank its basis alone; None: they take several."""
    if layer.disable_adapters:
        return None
    names = _own(layer, rows)
    if layer.stored_cores is not None and rows.places is not None:
        return None if names else (layer.stored_cores.basis,)
    return tuple(names) if len(names) > 1 and on_one_basis(layer, names) else None


def of_rows(layer: LoRASBLinear, rows: Rows) -> RowCores:
    """The operands of that call."""
    bank, places = layer.stored_cores, rows.places
    if bank is not None and places is not None:
        return of_bank(layer, bank, places)
    return of_adapters(layer, _own(layer, rows), rows)


def _own(layer: LoRASBLinear, rows: Rows) -> list[str]:
    """The rows' adapters that the layer has itself."""
    return [name for name in rows.others if name in layer.lorasb_R]


def _parts(layer: LoRASBLinear, rows: Rows) -> tuple[list[RowCores], list[str]]:
    """What is computed in one call, for all rows, and adapters that are computed alone."""
    if layer.disable_adapters:
        return [], []
    names = _own(layer, rows)
    bank, places = layer.stored_cores, rows.places
    parts = [] if bank is None or places is None else [of_bank(layer, bank, places)]
    if len(names) > 1 and on_one_basis(layer, names):
        return [*parts, of_adapters(layer, names, rows)], []
    return parts, names


def _computed(layer: LoRASBLinear, x: Tensor, part: RowCores, fused: bool = False) -> Tensor:
    """s·x_i Aᵀ R_kᵀ Bᵀ of all rows; `fused` with the base's product in the same call."""
    quantized, dtype = layer.quantized() if fused else None, x.dtype
    x = layer.on_base_dtype(x, quantized)
    autocast = autocast_on(x.device.type)
    weight, bias = (quantized or layer.dense_weight(), layer.bias_like(x)) if fused else (None, None)
    if not fused and not autocast:
        x = x.to(part.a.dtype)  # fp32 factors beside a base in 16 bits
    y = lora_sb_linear(x, weight, part.a, part.cores, part.b, bias, part.scaling, index=part.places)
    return y if autocast else y.to(dtype)


def _add_one_by_one(layer: LoRASBLinear, y: Tensor, x: Tensor, names: list[str], rows: Rows) -> Tensor:
    """y plus the parts of adapters with factors of their own, each over its rows."""
    for name in names:
        indices = (rows.index == rows.names.index(name)).nonzero().flatten().to(x.device)
        if len(indices) == len(x):
            y = y + layer.adapter_forward(layer.on_base_dtype(x), name).to(y.dtype)
        elif len(indices):
            delta = layer.adapter_forward(layer.on_base_dtype(x[indices]), name)
            y = y.index_add(0, indices, delta.to(y.dtype))
    return y


def on_one_basis(layer: LoRASBLinear, names: list[str]) -> bool:
    """True if adapters have the same A and B tensors and one s, and nothing that is computed adapter by adapter."""
    first = names[0]
    a, b = layer.lorasb_A[first], layer.lorasb_B[first]
    return all(
        layer.lorasb_A[name] is a
        and layer.lorasb_B[name] is b
        and layer.scaling[name] == layer.scaling[first]
        and not layer.equivalent[name]
        and not (layer.training and layer.lora_dropout[name])
        for name in names
    )


def trains_by_row(layer: LoRASBLinear, names: list[str]) -> bool:
    """True if rows may have these adapters while they are trained: one call has their gradients apart."""
    mine = [name for name in names if name in layer.lorasb_R]
    return not mine or (layer.trains_rows and on_one_basis(layer, mine))


def of_adapters(layer: LoRASBLinear, names: list[str], rows: Rows) -> RowCores:
    """The R's of PEFT's adapters, stacked for this call, with gradients."""
    first = names[0]
    cores = torch.stack([guarded_core(layer, name) for name in names])
    places = torch.tensor([names.index(name) if name in names else -1 for name in rows.names])
    return RowCores(layer.lorasb_A[first], layer.lorasb_B[first], cores, places[rows.index], layer.scaling[first])


def of_bank(layer: LoRASBLinear, bank: StoredCores, places: Tensor) -> RowCores:
    """The R's of a bank, as they lie; `places` [n]: each row's slot, or -1."""
    basis, modules = bank.basis, layer._modules  # as in `adapter_forward`: the public way takes microseconds
    a, b = (cast(Any, modules[factor])._parameters[basis] for factor in FROZEN_FACTORS)
    return RowCores(a, b, bank.stack(), places, layer.scaling[basis])
