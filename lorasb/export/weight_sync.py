"""Adapter-only synchronization, for RL: the basis (A and s·B) once, R after every step; the base is never touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import uncompiled
from ..layers.lookup import adapted_layers, layer_kinds, refuse_uninitialized
from .lora import fuse_experts, in_pefts_layout

PARTS = ("lora", "basis", "core")


@torch.no_grad()
def adapter_delta(
    model: nn.Module, part: str = "lora", *, adapter_name: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors for a process that serves the same base: no weight is merged, none of the base is sent.

    A trainer sends `adapter_delta(model, "basis")` once, and "core" after every step: 4·r² bytes per layer, 3.7 MB for
    the 224 linears of a 7B Llama at r = 64. The other side makes the plain LoRA of the two with `lora_of`.

    Args:
        model: a patched model.
        part: "lora" (lora_A = A, lora_B = s·B·R, by PEFT's names), "basis" (A [r, in] and s·B [out, r]) or "core" (R).
        adapter_name: which adapter; the active one by default.
        dtype: of the tensors; that of the factors by default, and fp32 for "lora".

    Returns:
        Tensors by name, on the model's device; those of "basis" and "core" are the adapter's own where no dtype or
        scale changes them: copy them to keep them beyond the next step.

    Raises:
        ValueError: an unknown part, or an adapter that is not initialized.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    model = uncompiled(model)
    name, layers = adapted_layers(model, adapter_name)
    refuse_uninitialized(layers, name)
    if part == "core":
        return {path: layer.lorasb_R[name].detach().to(dtype=dtype) for path, layer in layers.items()}
    basis: dict[str, Tensor] = {}
    for path, layer in layers.items():
        a, b, s = layer.lorasb_A[name].detach(), layer.lorasb_B[name].detach(), layer.adapters[name].scaling
        basis[f"{path}.A"] = a.to(dtype=dtype)
        basis[f"{path}.B"] = (b if s == 1.0 else b.float() * s).to(dtype=dtype)
    if part == "basis":
        return basis
    core = {path: layer.lorasb_R[name].detach() for path, layer in layers.items()}
    return lora_of(basis, core, kinds=layer_kinds(layers), dtype=dtype or torch.float32)


@torch.no_grad()
def lora_of(
    basis: Mapping[str, Tensor],
    core: Mapping[str, Tensor],
    *,
    kinds: Mapping[str, Sequence[Any]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The plain LoRA of a basis and R's, as `adapter_delta(model)` gives it on the trainer's side: lora_alpha = r.

    Args:
        basis: of `adapter_delta(model, "basis")`.
        core: of `adapter_delta(model, "core")`.
        kinds: `layer_kinds` of the adapter's config, if it has embeddings or convolutions.
        dtype: of the result; products are fp32.

    Raises:
        ValueError: the two do not have the same layers.
    """
    names = {key[: -len(".A")] for key in basis if key.endswith(".A")}
    if names != set(core):
        odd = sorted(names ^ set(core))
        raise ValueError(
            f"expected R of every layer of the basis, and no other: {', '.join(odd[:3])} is on one side only"
        )
    pairs = {n: (basis[f"{n}.A"].float(), basis[f"{n}.B"].float() @ r.float()) for n, r in core.items()}
    fused = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in fuse_experts(pairs).items()}
    return in_pefts_layout(fused, kinds or {})
