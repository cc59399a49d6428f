"""Which 3-D experts can be unfused, by their transformers class, and unfusing those that a config targets."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..layers.unfused_experts import NAMES, OpenExperts, is_target


def open_targets(model: nn.Module, target_parameters: list[str]) -> list[str]:
    """Unfuse the experts that have a parameter of one of these names (matched by suffix).

    Returns:
        Full names of the matching parameters.

    Raises:
        ValueError: no parameter has one of the names.
        TypeError: experts of another layout.
    """
    matched: dict[str, bool] = dict.fromkeys(target_parameters, False)
    parameter_names: list[str] = []
    for path, module in list(model.named_modules()):  # a list, as modules are replaced in the loop
        names = NAMES if isinstance(module, OpenExperts) else [n for n, _ in module.named_parameters(recurse=False)]
        targets = [f"{path}.{name}" for name in names if is_target(f"{path}.{name}", target_parameters)]
        for full in targets:
            matched |= {target: True for target in target_parameters if is_target(full, [target])}
        if targets and not isinstance(module, OpenExperts):
            _check(path, module, targets)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, OpenExperts(module))
        parameter_names += targets
    missing = [target for target, is_matched in matched.items() if not is_matched]
    if missing:
        raise ValueError(
            f"target_parameters: no parameter is called {', '.join(missing)}. Experts have "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; plain linears belong into target_modules"
        )
    return parameter_names


def _check(path: str, module: nn.Module, targets: list[str]) -> None:
    kind = type(module).__name__
    if [name for name, _ in module.named_parameters(recurse=False)] != list(NAMES) or not _has_known_forward(module):
        raise TypeError(
            f"target_parameters: {targets[0]} belongs to a {kind}, whose experts are laid out or computed in another "
            f"way than Mixtral's and Qwen3-MoE's, the ones that lorasb opens. Leave {path} out of target_parameters"
        )
    for name in NAMES:
        weights = getattr(module, name)
        if weights.dim() != 3 or not weights.is_floating_point() or type(weights.data) is not Tensor:
            raise TypeError(f"expected {path}.{name} [experts, out, in] in 16 or 32 bits, got {list(weights.shape)}")


def _has_known_forward(module: nn.Module) -> bool:
    """True if the class's forward has the bytecode of Mixtral's or Qwen3-MoE's.

    transformers generates a copy of it for many model families, under other class names.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def code(kind: Any) -> tuple[Any, ...]:
        compiled = inspect.unwrap(kind.forward).__code__
        return compiled.co_code, compiled.co_names, compiled.co_consts[1:]  # the first constant is the docstring

    module_code = code(type(module))
    return not getattr(module, "is_transposed", False) and module_code in (code(MixtralExperts), code(Qwen3MoeExperts))
