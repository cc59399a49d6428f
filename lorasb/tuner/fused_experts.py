"""Opens the parameters that a config targets: Mixtral's kind of experts into linears, all others in place."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..compat import peft as private
from ..compat.transformers import computes_like_mixtral
from ..config.adapter import ALL_LINEAR, LoRASBConfig
from ..layers.unfused_experts import NAMES, OpenExperts, is_target
from ..layers.weight_adapter import OpenParameters

# What the linears of one expert were called before transformers fused those of all experts into one parameter.
ONCE_CALLED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def open_all(model: nn.Module, config: LoRASBConfig, by_old_names: bool) -> None:
    """Open what `target_parameters` names, and experts that `target_modules` names as older checkpoints did."""
    if by_old_names and config.target_modules and config.target_modules != ALL_LINEAR:
        added = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name, parts in ONCE_CALLED.items()
            if _has_experts(module, name) and any(_names_all(config, f"{path}.0", name, part) for part in parts)
        ]
        if added:
            config.target_parameters = sorted({*(config.target_parameters or ()), *added})
    if config.target_parameters:
        open_targets(model, config.target_parameters)


def _has_experts(module: nn.Module, name: str) -> bool:
    """True if a parameter of the module has a matrix for each expert, or is open already."""
    parameter = module._parameters.get(name)
    return isinstance(module, OpenExperts) or (parameter is not None and parameter.dim() == 3)


def _names_all(config: LoRASBConfig, expert: str, fused: str, parts: tuple[str, ...]) -> bool:
    matched = {part: BaseTuner._check_target_module_exists(config, f"{expert}.{part}") for part in parts}
    named = [part for part, match in matched.items() if match and not isinstance(match, private.ExcludedModule)]
    if named and len(named) < len(parts):
        missing = ", ".join(part for part in parts if part not in named)
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(named)} without also targeting {missing} because they are fused "
            f"into {fused}."
        )
    return bool(named)


def open_targets(model: nn.Module, target_parameters: list[str]) -> list[str]:
    """Open the parameters of these names (matched by suffix) and return their full names; raise if one has none."""
    parameter_names: list[str] = []
    for path, module in list(model.named_modules()):  # a list, as modules are replaced in the loop
        inner = module.base_layer if isinstance(module, OpenParameters) else module  # opened for an earlier adapter
        names = (
            NAMES if isinstance(module, OpenExperts) else [name for name, _ in inner.named_parameters(recurse=False)]
        )
        full_names = {name: f"{path}.{name}".removeprefix(".") for name in names}
        targets = {name: full for name, full in full_names.items() if is_target(full, target_parameters)}
        if targets and not isinstance(module, OpenExperts):
            _open(model, path, module, list(targets))
        parameter_names += targets.values()
    missing = [target for target in target_parameters if not any(is_target(name, [target]) for name in parameter_names)]
    if missing:
        raise ValueError(
            f"target_parameters: no parameter is called {', '.join(missing)}. Experts have "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; plain linears belong into target_modules"
        )
    return parameter_names


def _open(model: nn.Module, path: str, module: nn.Module, names: list[str]) -> None:
    if not path:
        raise ValueError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter {names[0]!r}). Put the "
            "model into a separate module, or name a parameter of a submodule"
        )
    inner: nn.Module = module.base_layer if isinstance(module, OpenParameters) else module
    for name in names:
        parameter = inner.get_parameter(name)
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise TypeError(
                f"target_parameters: expected a matrix [a, b] or matrices [experts, a, b] in 16 or 32 bits, "
                f"{path}.{name} is {list(parameter.shape)} in {parameter.dtype}"
            )
    if isinstance(module, OpenParameters):
        module.open(names)
        return
    # experts with two 3-D weights and no more, which compute as Mixtral's and Qwen3-MoE's do
    parameters = dict(module.named_parameters(recurse=False))
    has_two = tuple(parameters) == NAMES and all(p.dim() == 3 for p in parameters.values())
    opened = OpenExperts(module) if has_two and computes_like_mixtral(module) else OpenParameters(module, names)
    model.set_submodule(path, opened)
