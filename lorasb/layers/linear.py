"""`LoRASBLinear`: a frozen linear layer with LoRA-SB adapters, as a PEFT tuner layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoints.shared_factors import missing_factors_error
from ..compat.transformers import is_loaded
from ..constants import FACTORS, FROZEN_FACTORS
from ..functional import lora_sb_linear
from ..ops.calls import autocast_on
from ..quantization.quantized_weight import QuantizedWeight
from ..utils.precision import SIXTEEN_BIT
from .adapted_layer import AdaptedLayer
from .adapter_state import Rows
from .base import factors_on_device

RowCores = tuple[Tensor, Tensor, Tensor, float, Tensor]  # of `row_cores`


def forward(layer: LoRASBLinear, x: Tensor, rows: Rows | Sequence[str], *args: object, **kwargs: object) -> Tensor:
    """Return y [..., out] of a linear with one adapter per row of x."""
    rows = layer.checked_rows(x, rows)
    calls, alone = calls_for(layer, rows)
    if len(calls) == 1 and not (alone or args or kwargs or is_wide(layer, calls[0]) or layer.base.must_run()):
        taken = layer.fused_output(layer, x, rows) if layer.fused_output is not None else None
        if taken is None:
            return _computed(layer, x, row_cores(layer, calls[0], rows), fused=True)
        return taken if autocast_on(x.device.type) else taken.to(x.dtype)
    y = layer.base.forward(x, *args, **kwargs)
    for names in calls:
        y = y + _computed(layer, x, row_cores(layer, names, rows)).to(y.dtype)
    for name in alone:  # on its rows only
        indices = (rows.index == rows.names.index(name)).nonzero().flatten().to(x.device)
        if len(indices) == len(x):
            y = y + layer.adapter_forward(layer.base.cast(x), name).to(y.dtype)
        elif len(indices):
            delta = layer.adapter_forward(layer.base.cast(x[indices]), name)
            y = y.index_add(0, indices, delta.to(y.dtype))
    return y


def calls_for(layer: AdaptedLayer, rows: Rows) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the adapters of each call that computes all rows (for a bank its basis), and those computed alone."""
    if layer.disable_adapters:
        return [], []
    calls: list[tuple[str, ...]] = []
    if layer.stored_cores is not None and rows.places is not None:
        calls.append((layer.stored_cores.basis,))
    names = [name for name in rows.others if name in layer.lorasb_R]
    if len(names) > 1 and on_one_basis(layer, names):
        return [*calls, tuple(names)], []
    return calls, names


def is_wide(layer: AdaptedLayer, names: Sequence[str]) -> bool:
    """True if one of these adapters computes in fp32 regardless of the base's dtype."""
    return True in [layer.adapters[name].wide_factors for name in names]


def row_cores(layer: AdaptedLayer, names: tuple[str, ...], rows: Rows) -> RowCores:
    """Return A [r, in], R's [K, r, r], B [out, r], s, and the place of each row's R, or -1 [n], int64 on the CPU.

    A bank's R's are not copied; those of the model's adapters are stacked, with gradients.
    """
    modules, bank, places = layer._modules, layer.stored_cores, rows.places  # public access takes microseconds
    a, b = (cast(Any, modules[factor])._parameters[names[0]] for factor in FROZEN_FACTORS)
    if len(names) == 1 and bank is not None and places is not None:
        return a, bank.stack(a.device), b, layer.adapters[names[0]].made_with, places
    cores = torch.stack([layer.core(name) for name in names])
    index = torch.tensor([names.index(name) if name in names else -1 for name in rows.names], device="cpu")
    return a, cores, b, layer.adapters[names[0]].scaling, index[rows.index]


def _computed(layer: LoRASBLinear, x: Tensor, operands: RowCores, fused: bool = False) -> Tensor:
    """Return s·x_i Aᵀ R_kᵀ Bᵀ of all rows, plus the base's product if `fused`."""
    a, cores, b, scaling, places = operands
    dtype, autocast = x.dtype, autocast_on(x.device.type)
    x, weight, bias = layer.base.operands(x) if fused else (layer.base.cast(x), None, None)
    if not fused and not autocast:
        x = x.to(a.dtype)  # fp32 factors with a base in 16 bits
    y = lora_sb_linear(x, weight, a, cores, b, bias, scaling, index=places)
    return y if autocast else y.to(dtype)


def on_one_basis(layer: AdaptedLayer, names: list[str]) -> bool:
    """True if adapters share A, B and s, and no option requires computing them separately."""
    first = names[0]
    a, b = layer.lorasb_A[first], layer.lorasb_B[first]
    return all(
        layer.lorasb_A[name] is a
        and layer.lorasb_B[name] is b
        and layer.adapters[name].scaling == layer.adapters[first].scaling
        and not layer.adapters[name].equivalent_gradient
        and not (layer.training and layer.adapters[name].lora_dropout)
        for name in names
    )


def trains_by_row(layer: AdaptedLayer, names: list[str]) -> bool:
    """True if one batch can train all of these adapters: one call gives each R its own gradient."""
    mine = [name for name in names if name in layer.lorasb_R]
    return not mine or (isinstance(layer, LoRASBLinear) and on_one_basis(layer, mine))


class LoRASBLinear(AdaptedLayer):
    """y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, with W, A and B frozen and R trained (paper, Eq. 3 and 8).

    With orthonormal A and B, the plain gradient of R is the one whose effect on W is closest to full fine-tuning
    (Theorem 3, Eq. 9). A new adapter has A = B = R = 0 and leaves y unchanged; `lorasb.initialize` sets all three.

    Args:
        base_layer: the frozen linear, `weight` [out, in] (or [in, out] with `fan_in_fan_out`); dense, or in 4 or 8 bits
            (bitsandbytes' `Linear4bit` and `Linear8bitLt`, or ours). A quantized base is computed from its storage,
            not by its own forward, which in bitsandbytes would repack the weight on a CPU. Any other linear is opaque:
            its own forward runs, and the adapter's output is added.
        adapter_name, r, scaling: name, rank and s of the first adapter.
        lora_dropout, equivalent_gradient, wide_factors: its options, as in `LoRASBConfig`.
        fan_in_fan_out: the weight is stored transposed, as in `transformers.Conv1D`.
        octet_dtype: compute dtype of an 8-bit base, which its storage does not record; if None, the dtype of its bias,
            or fp16 without a bias.
        resolver_options: for PEFT's resolver of quantized layers: `get_quantization_kwargs(model)`.

    Forward: x [..., in] -> y [..., out], in x's dtype, or autocast's.

    Raises:
        RuntimeError: on a training forward of an adapter that has not been initialized.
    """

    # set by `linear_group.attach`: returns y computed together with other layers that read x, or None
    fused_output: Callable[[LoRASBLinear, Tensor, Rows | None], Tensor | None] | None = None

    def forward(
        self, x: Tensor, *args: object, adapter_names: Rows | Sequence[str] | None = None, **kwargs: object
    ) -> Tensor:
        """y [..., out] for x [..., in]. Arguments other than `adapter_names` are passed to the base layer's forward."""
        if adapter_names is not None:
            return forward(self, x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:  # as in PEFT: the base's own result needs the base's own weight
            self.unmerge()
        off = self.disable_adapters or self.merged
        names = [] if off else list(filter(self.adapters.__contains__, self.active_adapters))
        base, dtype = self.base, x.dtype
        if not names:
            return base.forward(x, *args, **kwargs)
        if args or kwargs or is_wide(self, names) or base.must_run():  # the base runs by itself, and adapters are added
            y = base.forward(x, *args, **kwargs)
            for name in names:
                y = y + self.adapter_forward(base.cast(x), name).to(y.dtype)
            return y
        # The group compares x by identity, so it has to see x before the cast.
        grouped = self.fused_output(self, x, None) if self.fused_output is not None else None
        x, weight, bias = base.operands(x)
        # The base's product is inside the first adapter's op.
        y = self.adapter_forward(x, names[0], weight, bias) if grouped is None else grouped
        for name in names[1:]:
            y = y + self.adapter_forward(x, name)
        return y if y.dtype == dtype or autocast_on(x.device.type) else y.to(dtype)

    def adapter_forward(
        self, x: Tensor, name: str, weight: Tensor | QuantizedWeight | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """s·x Aᵀ Rᵀ Bᵀ of one adapter [..., out], plus the base's product if its weight is given."""
        # Public indexing of ParameterDicts takes as long as the adapter's products for a single token.
        modules: dict[str, Any] = self._modules
        a, b = modules["lorasb_A"]._parameters[name], modules["lorasb_B"]._parameters[name]
        core, state = modules["lorasb_R"]._parameters[name], self.adapters[name]
        if a.is_meta and not x.is_meta:
            with factors_on_device([modules[factor] for factor in FACTORS], name) as (a, core, b):
                if weight is None and not autocast_on(x.device.type):
                    x = x.to(a.dtype)  # as below
                return lora_sb_linear(x, weight, a, core, b, bias, state.scaling)
        # transformers' loader reads only adapter_model.safetensors, which has no A and B if factors are shared.
        if not state.initialized and is_loaded(core) and not is_loaded(a):
            raise missing_factors_error()
        if not state.initialized or state.equivalent_gradient or core.dtype in SIXTEEN_BIT:  # else R as it is
            core = self.core(name)
        if weight is None and x.dtype != a.dtype and not autocast_on(x.device.type):
            x = x.to(a.dtype)  # fp32 factors with a base in 16 bits
        dropout = state.lora_dropout if self.training else 0.0
        return lora_sb_linear(x, weight, a, core, b, bias, state.scaling, dropout=dropout)


@torch.no_grad()
def equivalent_gradient(layer: LoRASBLinear, adapter_name: str | None = None) -> Tensor:
    """The gradient of R whose effect on W is closest to the full gradient (Theorem 3).

    g_R* = (1/s²) (BᵀB)⁻¹ g_R (AAᵀ)⁻¹ minimizes ‖s B g A − ∇W L‖; with orthonormal factors it is g_R / s².

    Args:
        layer: a layer whose R has a gradient.
        adapter_name: name of the adapter; the first active one if None.

    Returns:
        [r, r] in R's dtype. If the layer was made with `equivalent_gradient=True`, this is R's gradient unchanged.

    Raises:
        ValueError: R has no gradient yet.
    """
    name = adapter_name or layer.active_adapters[0]
    gradient = layer.lorasb_R[name].grad
    if gradient is None:
        raise ValueError(f"adapter {name!r} has no gradient: call loss.backward() first")
    if layer.adapters[name].equivalent_gradient:
        return gradient
    left, right = layer.preconditioner(name)
    return left @ gradient @ right
