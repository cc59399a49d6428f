"""Unfuse experts whose weights are 3-D parameters into one linear layer per expert, which an adapter can wrap.

    gate_up_proj G [E, 2·I, H], down_proj D [E, H, I]:  y_t = Σ_e p_te · D_e (act(g)·u),  [g, u] = G_e x_t

Each expert gets its own A, R and B, initialized from the tokens that are routed to it. The linears' weights are views
of the 3-D parameters, so that unfusing allocates nothing. Other `target_parameters` are adapted in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..compat.transformers import computes_like_mixtral
from ..config.adapter import ALL_LINEAR, LoRASBConfig
from .adapter_state import Rows
from .base import linear_over
from .weight_adapter import OpenParameters

NAMES = ("gate_up_proj", "down_proj")  # of the 3-D parameters, in the order of their registration
# Names of one expert's linears before transformers fused those of all experts into one parameter.
ONCE_CALLED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


class OpenExperts(nn.Module):
    """Experts with a linear layer each: `gate_up_proj.0`, ..., `down_proj.0`, ...

    Forward: x [T, H], indices of the top-k experts [T, k] and their routing weights [T, k] -> y [T, H].
    """

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(getattr(fused, NAMES[0]))
        self.act_fn = cast(Callable[[Tensor], Tensor], fused.act_fn)
        # In a list, so that it is not a submodule: its parameters share memory with the linears' and would count twice.
        self._fused = [fused]
        self.training = fused.training
        for name in NAMES:
            weights = getattr(fused, name).detach()
            setattr(self, name, nn.ModuleList(linear_over(weight) for weight in weights))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Rows | None = None
    ) -> Tensor:
        """y [T, H], the sum of the experts' results by routing weight; `adapter_names` has one name per token."""
        # Sort the T·k (token, expert) pairs by expert, so that each expert's tokens are contiguous. The stable sort
        # keeps them in the order of the batch, which fixes the order of the sums.
        expert_of_pair = top_k_index.reshape(-1)
        order = expert_of_pair.argsort(stable=True)
        # Under expert parallelism, pairs of other ranks' experts have the index num_experts: sorted last, cut off.
        counts = torch.bincount(expert_of_pair, minlength=self.num_experts).tolist()[: self.num_experts]
        order = order[: sum(counts)]
        tokens = order // top_k_index.shape[-1]
        y = torch.zeros_like(hidden_states)
        # In distributed training experts without tokens run too (on 0 rows): every rank has to have a gradient for
        # the same Rs, or the ranks' all-reduces would not match.
        run_all = self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
        experts = [e for e, count in enumerate(counts) if count or run_all]
        if not experts:
            return y
        counts = [counts[e] for e in experts]
        inputs, token_indices = hidden_states[tokens].split(counts), tokens.split(counts)
        names = [None if adapter_names is None else adapter_names.select(indices) for indices in token_indices]
        calls = zip(experts, inputs, names, strict=True)
        results = torch.cat([self._expert(e, x, rows) for e, x, rows in calls])
        weighted = results * top_k_weights.reshape(-1)[order, None]
        return y.index_add(0, tokens, weighted.to(y.dtype))

    def _expert(self, e: int, x: Tensor, rows: Rows | None) -> Tensor:
        gate, up = _call(self.gate_up_proj[e], x, rows).chunk(2, dim=-1)
        return _call(self.down_proj[e], self.act_fn(gate) * up, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenExperts:
        """Move or cast the linears, and release the 3-D parameters if the weights are no longer views of them."""
        super()._apply(fn, recurse)
        if not self._aliased():
            for name in NAMES:
                self._fused[0]._parameters[name] = None
        return self

    def _aliased(self) -> bool:
        """True if every linear's weight is still a view of its 3-D parameter."""
        for name in NAMES:
            parameter = self._fused[0]._parameters[name]
            if parameter is None or parameter.is_meta:
                return False
            for e, layer in enumerate(getattr(self, name)):
                if layer.weight.data_ptr() != parameter[e].data_ptr() or layer.weight.dtype != parameter.dtype:
                    return False
        return True

    def closed(self) -> nn.Module:
        """Return transformers' own module with the linears' current weights."""
        fused = self._fused[0]
        if not self._aliased():
            for name in NAMES:
                weights = torch.stack([layer.weight.detach() for layer in getattr(self, name)])
                fused._parameters[name] = nn.Parameter(weights, requires_grad=False)
        return fused.train(self.training)


def _call(layer: nn.Module, x: Tensor, rows: Rows | None) -> Tensor:
    """Call a linear; a layer with adapters gets the adapter names as well."""
    result: Tensor = layer(x) if rows is None or type(layer) is nn.Linear else layer(x, adapter_names=rows)
    return result


def is_target(name: str, target_parameters: list[str]) -> bool:
    """True if a parameter's name is a target, or ends with a dot and a target."""
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def parameter_of(name: str) -> str | None:
    """The name of the 3-D parameter that an expert's linear `...gate_up_proj.3` is a slice of; None for other names."""
    match = re.fullmatch(rf"(.*\.(?:{'|'.join(NAMES)}))\.\d+", name)
    return match.group(1) if match else None


def open_all(model: nn.Module, config: LoRASBConfig, by_old_names: bool) -> None:
    """Open the parameters in `target_parameters`, and experts that `target_modules` gives by their older names."""
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
    """True if the module's parameter `name` has one matrix per expert, or the module is already open."""
    parameter = module._parameters.get(name)
    return isinstance(module, OpenExperts) or (parameter is not None and parameter.dim() == 3)


def _names_all(config: LoRASBConfig, expert: str, fused: str, parts: tuple[str, ...]) -> bool:
    named = [part for part in parts if BaseTuner._check_target_module_exists(config, f"{expert}.{part}")]
    if named and len(named) < len(parts):
        missing = ", ".join(part for part in parts if part not in named)
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(named)} without also targeting {missing} because they are fused "
            f"into {fused}."
        )
    return bool(named)


def open_targets(model: nn.Module, target_parameters: list[str]) -> list[str]:
    """Open the parameters of these names (matched by suffix) and return their full names; raise if one is not found."""
    parameter_names: list[str] = []
    for path, module in list(model.named_modules()):  # a list, as modules are replaced in the loop
        inner = module.base_layer if isinstance(module, OpenParameters) else module  # opened for an earlier adapter
        names: Iterable[str] = NAMES if isinstance(module, OpenExperts) else dict(inner.named_parameters(recurse=False))
        full_names = {name: f"{path}.{name}".removeprefix(".") for name in names}
        targets = {name: full for name, full in full_names.items() if is_target(full, target_parameters)}
        if targets and not isinstance(module, OpenExperts):
            _open(model, path, module, list(targets))
        parameter_names += targets.values()
    missing = [target for target in target_parameters if not any(is_target(name, [target]) for name in parameter_names)]
    if missing:
        raise ValueError(
            f"target_parameters: no parameter is called {', '.join(missing)}. Experts have "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; plain linears belong in target_modules"
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
    # only experts with exactly two 3-D weights that compute as Mixtral's and Qwen3-MoE's do get linears
    parameters = dict(module.named_parameters(recurse=False))
    has_two = tuple(parameters) == NAMES and all(p.dim() == 3 for p in parameters.values())
    opened = OpenExperts(module) if has_two and computes_like_mixtral(module) else OpenParameters(module, names)
    model.set_submodule(path, opened)


def close(model: nn.Module) -> None:
    """Restore the original modules where no expert or parameter has an adapter."""
    for path, module in reversed(list(model.named_modules())):  # inner ones first
        if isinstance(module, OpenParameters) and not module.adapted():
            model.set_submodule(path, module.base_layer)
        if isinstance(module, OpenExperts) and all(type(m) is nn.Linear for n in NAMES for m in getattr(module, n)):
            model.set_submodule(path, module.closed())
