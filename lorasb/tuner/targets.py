"""Which modules are adapted, at which rank: what a config says, checked against the model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers import unfused_experts
from ..quantization.quantized_weight import is_quantized, of_module
from ..utils.dtypes import FLOATS
from .config import DEFAULT_RANK, LoRASBConfig

OWN_WEIGHT_READERS = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


def rank_for(config: LoRASBConfig, name: str) -> int:
    """The rank of the layer `name`: its entry in rank_pattern (name or regex, matched at the end), else r."""
    return _pattern_rank(config, name) or config.r or DEFAULT_RANK


def _pattern_rank(config: LoRASBConfig, name: str) -> int | None:
    matching = (rank for key, rank in config.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, None)


def resolve_ranks(config: LoRASBConfig, targets: dict[str, nn.Module]) -> None:
    """Write the default rank into the config, with the layers too small for it; check explicit ones."""
    default = config.r is None
    capped = {}
    for name, module in targets.items():
        limit = min(features_of(base_of(module)))
        if rank_for(config, name) <= limit:
            continue
        if not default or _pattern_rank(config, name) is not None:
            raise ValueError(
                f"rank {rank_for(config, name)} is more than layer {name!r} allows: min(in_features, out_features) = "
                f"{limit}. Lower r, or give this layer its own: rank_pattern={{{name.rpartition('.')[2]!r}: {limit}}}"
            )
        capped[re.escape(name)] = limit
    config.r, config.rank_pattern = config.r or DEFAULT_RANK, config.rank_pattern | capped


def chosen(model: nn.Module, config: LoRASBConfig) -> set[str]:
    """What "all-linear" leaves after layers_to_transform, which PEFT applies to short names only, and heads."""
    names = {
        n
        for n in config.target_modules or ()
        if not isinstance(model.get_submodule(n), OWN_WEIGHT_READERS) and unfused_experts.parameter_of(n) is None
    }
    if config.layers_to_transform is None:
        return names
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = {n: re.match(rf"(?:^|.*?\.)(?:{'|'.join(patterns)})\.(\d+)\.", n) for n in names}
    return {name for name, match in found.items() if match and int(match.group(1)) in wanted}


def refuse_tied_head(model: Any, targets: dict[str, nn.Module]) -> None:
    """A head that shares the embedding's weight cannot be adapted: merging would move the embedding too."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    shared = getattr(embedding, "weight", None)
    for name, module in targets.items():
        if shared is not None and base_of(module).weight is shared:
            raise ValueError(
                f"target {name!r} shares its weight with the input embedding: leave it out of target_modules, or load "
                "the model with tie_word_embeddings=False"
            )


def base_of(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def features_of(base: Any) -> tuple[int, int]:
    """(out, in), either way round: a packed weight's own shape tells nothing."""
    shape = (base.out_features, base.in_features) if is_quantized(base) else base.weight.shape
    return int(shape[0]), int(shape[1])


def inside_tuner(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), BaseTunerLayer) for i in range(1, len(parts)))


def check_supported(name: str, module: nn.Module) -> None:
    """Raise a TypeError or ValueError that names a target which cannot be adapted, and says what can."""
    base = base_of(module)
    if is_quantized(base):
        try:
            of_module(base)
        except (TypeError, ValueError) as error:
            raise type(error)(f"target {name!r}: {error}") from None
        return
    weight = getattr(base, "weight", None)
    if isinstance(base, OWN_WEIGHT_READERS):
        raise TypeError(
            f"target {name!r} belongs to an nn.MultiheadAttention, which reads its weight and never calls it: "
            "name it in exclude_modules"
        )
    if isinstance(base, nn.Linear | Conv1D) and weight is not None:
        if weight.dim() == 2 and weight.dtype in FLOATS and type(weight.data) is Tensor:
            return
        raise TypeError(
            f"target {name!r} is a {type(base).__name__} with a {weight.dtype} weight {list(weight.shape)}: expected "
            "fp32, bf16 or fp16, or a layer that bitsandbytes or lorasb.quantize quantized"
        )
    raise TypeError(
        f"target {name!r} is a {type(base).__name__}: expected nn.Linear (or transformers' Conv1D). "
        "Narrow target_modules, or name it in exclude_modules"
    )
