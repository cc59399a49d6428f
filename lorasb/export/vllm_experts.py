"""Experts in the layout that vLLM loads: a plain linear of each expert's gate, up and down projection.

vLLM expands its module `experts` to one entry an expert and projection, `experts.{e}.{name}`, with the names that the
model's checkpoint has (`process_packed_modules_mapping`, vllm/lora/utils.py). It does not read PEFT's layout of
`target_parameters`, which has all experts in one tensor.
"""

from __future__ import annotations

from torch import Tensor

from ..layers.unfused_experts import NAMES, parameter_of

Pair = tuple[Tensor, Tensor]
GATE_UP, DOWN = NAMES
# Of gate, up and down, and of the block's module, where a checkpoint has others than most: by config.model_type.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OTHER_NAMES = {"mixtral": (("w1", "w3", "w2"), ".mlp.experts", ".block_sparse_moe.experts")}


def per_expert(factors: dict[str, Pair], model_type: str | None) -> dict[str, Pair]:
    """Every layer's lora_A [r, in] and lora_B [out, r] by vLLM's names.

    Gate and up share their A, and each has its half of B.

    Args:
        factors: by our names, `...experts.gate_up_proj.3` for expert 3.
        model_type: of the base's config.
    """
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
            named[f"{expert}.{gate}"], named[f"{expert}.{up}"] = ((a, half) for half in b.chunk(2))
    return named


def target_modules(named: dict[str, Pair]) -> list[str]:
    """The last parts of the layers' names, which vLLM checks an adapter's config for."""
    return sorted({name.rpartition(".")[2] for name in named})
