"""Names and shapes that PEFT's LoRA gives the factors of embeddings and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..layers.weight_adapter import CONVOLUTION, EMBEDDING, SLICE


def refuse_slices(kinds: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ValueError for adapters of a parameter's matrices, by the config's `layer_kinds`."""
    name = next((name for name, kind in kinds.items() if kind[0] == SLICE), None)
    if name is not None:
        raise ValueError(
            f"{name!r} is a matrix of a parameter whose module computes it in another layout, which a plain LoRA "
            "does not know: merge the adapter (model.merge_and_unload())"
        )


def in_pefts_layout(name: str, a: Tensor, b: Tensor, kind: Sequence[Any] | None) -> dict[str, Tensor]:
    """State dict entries of one layer's lora_A [r, in] and lora_B [out, r].

    Args:
        name: of the layer.
        a, b: its factors.
        kind: its entry of the config's `layer_kinds`: [kind, parameter, groups, *shape]; None for a linear.

    Raises:
        ValueError: a convolution in groups, or attention, which PEFT's LoRA cannot hold as we have them.
    """
    if kind is None:
        return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    what, _, groups, *shape = kind
    if what == EMBEDDING:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    if what == CONVOLUTION:
        if groups != 1:
            raise ValueError(
                f"{name!r} is a convolution in groups, which a plain LoRA cannot hold: merge the adapter "
                "(model.merge_and_unload()), or leave the layer out with exclude_modules"
            )
        ones = [1] * len(shape[2:])
        return {f"{name}.lora_A.weight": a.reshape(-1, *shape[1:]), f"{name}.lora_B.weight": b.reshape(*b.shape, *ones)}
    # Measured with PEFT 0.21.2, plain LoRA of nn.MultiheadAttention: what it computes has out_proj's update doubled.
    raise ValueError(
        f"{name!r} is nn.MultiheadAttention, whose output projection PEFT's LoRA updates twice: merge the adapter "
        "(model.merge_and_unload()), or leave the layer out with exclude_modules"
    )
