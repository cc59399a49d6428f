"""Names and shapes of a plain LoRA's factors: PEFT's for embeddings and convolutions, vLLM's for experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..layers.unfused_experts import NAMES, parameter_of
from ..layers.weight_adapter import CONVOLUTION, EMBEDDING, SLICE

Pair = tuple[Tensor, Tensor]
GATE_UP, DOWN = NAMES
# Of gate, up and down, and of the block's module, where a checkpoint has others than most: by config.model_type.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OTHER_NAMES = {"mixtral": (("w1", "w3", "w2"), ".mlp.experts", ".block_sparse_moe.experts")}


def refuse_slices(kinds: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ValueError for adapters of a parameter's matrices, by the config's `layer_kinds`."""
    name = next((name for name, kind in kinds.items() if kind[0] == SLICE), None)
    if name is not None:
        raise ValueError(
            f"{name!r} is a matrix of a parameter whose module computes it in another layout, which a plain LoRA "
            "does not know: merge the adapter (model.merge_and_unload())"
        )


def in_pefts_layout(name: str, a: Tensor, b: Tensor, kind: Sequence[Any] | None) -> dict[str, Tensor]:
    """State dict entries of a layer's lora_A [r, in], lora_B [out, r] by its `layer_kinds` entry (None: a linear)."""
    if kind is None:
        return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    what, _, groups, *shape = kind  # the second is the parameter
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


# vLLM expands its module `experts` to one entry per expert and projection, `experts.{e}.{name}`, with the checkpoint's
# names (`process_packed_modules_mapping`, vllm/lora/utils.py); it does not read PEFT's layout of `target_parameters`.
def per_expert(factors: dict[str, Pair], model_type: str | None) -> dict[str, Pair]:
    """Every layer's lora_A [r, in] and lora_B [out, r] by vLLM's names."""
    named: dict[str, Pair] = {}
    (gate, up, down), mine, theirs = OTHER_NAMES.get(model_type or "", (PROJECTIONS, "", ""))
    for name, (a, b) in factors.items():
        parameter = parameter_of(name)
        if parameter is None:
            named[name] = a, b
            continue
        experts, _, projection = parameter.rpartition(".")
        expert = f"{experts.replace(mine, theirs) if mine else experts}.{name.rpartition('.')[2]}"
        if projection == DOWN:
            named[f"{expert}.{down}"] = a, b
        else:
            # they share A, and each has its half of B
            named[f"{expert}.{gate}"], named[f"{expert}.{up}"] = ((a, half) for half in b.chunk(2))
    return named


def target_modules(named: dict[str, Pair]) -> list[str]:
    """The last parts of the layers' names, which vLLM checks an adapter's config for."""
    return sorted({name.rpartition(".")[2] for name in named})
