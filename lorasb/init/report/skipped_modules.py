"""Modules that are not adapted by design: heads tied to the embedding, routers, and fused experts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...constants import PEFT_PREFIX
from ...layers.unfused_experts import NAMES, OpenExperts

ROUTER_SUFFIXES = ("Router", "Gate")  # of class names in transformers


def skipped_modules(model: nn.Module) -> list[str]:
    """One line for each kind of skipped module, with the setting that adapts it if there is one."""
    lines = []
    tied = _tied_head(model)
    if tied:
        lines.append(f"{tied}: shares its weight with the input embedding")
    routers = _matching(model, lambda module: type(module).__name__.endswith(ROUTER_SUFFIXES))
    if routers:
        lines.append(f"{len(routers)} routers ({routers[0]}, ...): they choose experts, and are not adapted")
    experts = _matching(model, _has_fused_experts)
    if experts:
        names = ", ".join(f'"experts.{name}"' for name in NAMES)
        lines.append(f"3-D experts ({experts[0]}, ...): target_parameters=[{names}] adapts those of Mixtral's kind")
    return lines


def _matching(model: nn.Module, predicate: Any) -> list[str]:
    """Names in the base model of the modules for which `predicate` is true."""
    return [name.removeprefix(PEFT_PREFIX) for name, module in model.named_modules() if name and predicate(module)]


def _has_fused_experts(module: nn.Module) -> bool:
    """True if a module has the weights of all its experts in 3-D parameters, not split into linear layers."""
    if isinstance(module, OpenExperts):
        return False
    return any(p.dim() == 3 and n.endswith("proj") for n, p in module.named_parameters(recurse=False))


def _tied_head(model: Any) -> str | None:
    """Name of the output head if it shares its weight with the input embedding: merging would change both."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_output_embeddings"):
        return None
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight is not getattr(embedding, "weight", None):
        return None
    return next((name for name, module in base.named_modules() if module is head), None)
