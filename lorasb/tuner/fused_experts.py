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
    if by_old_names:
        _target_by_old_names(model, config)
    if config.target_parameters:
        open_targets(model, config.target_parameters)


def _target_by_old_names(model: nn.Module, config: LoRASBConfig) -> None:
    """Add to `target_parameters` the experts whose linears `target_modules` names as older checkpoints did."""
    if config.target_modules == ALL_LINEAR or not config.target_modules:
        return
    added = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parts in ONCE_CALLED.items()
        if _has_experts(module, name) and any(_names_all(config, f"{path}.0", name, part) for part in parts)
    ]
    if added:
        config.target_parameters = sorted({*(config.target_parameters or ()), *added})


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
    matched: dict[str, bool] = dict.fromkeys(target_parameters, False)
    parameter_names: list[str] = []
    for path, module in list(model.named_modules()):  # a list, as modules are replaced in the loop
        full_names = [f"{path}.{name}".removeprefix(".") for name in _names(module)]
        targets = [full for full in full_names if is_target(full, target_parameters)]
        for full in targets:
            matched |= {target: True for target in target_parameters if is_target(full, [target])}
        if targets:
            _open(model, path, module, [full.removeprefix(f"{path}.") for full in targets])
        parameter_names += targets
    missing = [target for target, is_matched in matched.items() if not is_matched]
    if missing:
        raise ValueError(
            f"target_parameters: no parameter is called {', '.join(missing)}. Experts have "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; plain linears belong into target_modules"
        )
    return parameter_names


def _names(module: nn.Module) -> list[str]:
    """Names of the parameters that may be opened, also of a module that an earlier adapter has opened."""
    if isinstance(module, OpenExperts):
        return list(NAMES)
    inner = module.base_layer if isinstance(module, OpenParameters) else module
    return [name for name, _ in inner.named_parameters(recurse=False)]


def _open(model: nn.Module, path: str, module: nn.Module, names: list[str]) -> None:
    if isinstance(module, OpenExperts):
        return
    if not path:
        raise ValueError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter {names[0]!r}). Put the "
            "model into a separate module, or name a parameter of a submodule"
        )
    inner: nn.Module = module.base_layer if isinstance(module, OpenParameters) else module
    for name in names:
        _check(f"{path}.{name}", inner.get_parameter(name))
    if isinstance(module, OpenParameters):
        module.open(names)
    else:
        model.set_submodule(path, OpenExperts(module) if _is_mixtral_like(module) else OpenParameters(module, names))


def _check(name: str, parameter: Tensor) -> None:
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point() or type(parameter.data) is not Tensor:
        raise TypeError(
            f"target_parameters: expected a matrix [a, b] or matrices [experts, a, b] in 16 or 32 bits, {name} is "
            f"{list(parameter.shape)} in {parameter.dtype}"
        )


def _is_mixtral_like(module: nn.Module) -> bool:
    """True for experts with two 3-D weights and no more that compute as Mixtral's and Qwen3-MoE's do."""
    parameters = dict(module.named_parameters(recurse=False))
    has_two = list(parameters) == list(NAMES) and all(p.dim() == 3 for p in parameters.values())
    return has_two and computes_like_mixtral(module)
