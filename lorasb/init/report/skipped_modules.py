"""What an adapter leaves alone on purpose: heads tied to the embedding, routers, experts that nobody named."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...constants import PEFT_PREFIX
from ...layers.unfused_experts import NAMES, OpenExperts

ROUTERS = ("Router", "Gate")  # how transformers ends the names of their classes


def left_alone(model: nn.Module) -> list[str]:
    """One line for each kind, with what adapts it where something does."""
    found = []
    tied = _tied_head(model)
    if tied:
        found.append(f"{tied}: shares its weight with the input embedding")
    routers = _called(model, lambda module: type(module).__name__.endswith(ROUTERS))
    if routers:
        found.append(f"{len(routers)} routers ({routers[0]}, ...): they choose experts, and are not adapted")
    experts = _called(model, _unopened)
    if experts:
        names = ", ".join(f'"experts.{name}"' for name in NAMES)
        found.append(f"3-D experts ({experts[0]}, ...): target_parameters=[{names}] adapts those of Mixtral's kind")
    return found


def _called(model: nn.Module, wanted: Any) -> list[str]:
    return [name.removeprefix(PEFT_PREFIX) for name, module in model.named_modules() if name and wanted(module)]


def _unopened(module: nn.Module) -> bool:
    if isinstance(module, OpenExperts):
        return False
    return any(p.dim() == 3 and n.endswith("proj") for n, p in module.named_parameters(recurse=False))


def _tied_head(model: Any) -> str | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_output_embeddings"):
        return None
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight is not getattr(embedding, "weight", None):
        return None
    return next((name for name, module in base.named_modules() if module is head), None)
