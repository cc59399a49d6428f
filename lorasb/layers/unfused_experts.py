"""Unfuses experts whose weights are 3-D parameters into one linear layer per expert, which an adapter can wrap.

    gate_up_proj G [E, 2·I, H], down_proj D [E, H, I]:  y_t = Σ_e p_te · D_e (act(g)·u),  [g, u] = G_e x_t

Each expert gets its own A, R and B, initialized from the tokens that are routed to it. The linears' weights are views
of the 3-D parameters, so that unfusing allocates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .opaque_format import linear_over
from .token_rows import Rows
from .weight_adapter import OpenParameters

NAMES = ("gate_up_proj", "down_proj")  # of the 3-D parameters, in the order of their registration


class OpenExperts(nn.Module):
    """Experts with a linear layer each: `gate_up_proj.0`, ..., `down_proj.0`, ...

    Forward: x [T, H], indices of the top-k experts [T, k] and their routing weights [T, k] -> y [T, H].

    Args:
        fused: transformers' experts module, which `closed` returns again.
    """

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(getattr(fused, NAMES[0]))
        self.act_fn: Any = fused.act_fn
        # In a list, so that it is no submodule: its parameters share memory with the linears' and would count twice.
        self._fused = [fused]
        self.training = fused.training
        for name in NAMES:
            weights = getattr(fused, name).detach()
            setattr(self, name, nn.ModuleList(linear_over(weight) for weight in weights))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Rows | None = None
    ) -> Tensor:
        """y [T, H], the sum of the experts' results by routing weight; `adapter_names` has one name per token."""
        order, counts = self._sorted_by_expert(top_k_index)
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

    def _sorted_by_expert(self, top_k_index: Tensor) -> tuple[Tensor, list[int]]:
        """The indices of the (token, expert) pairs in the order of their experts, and each expert's number of pairs."""
        # Sort the T·k (token, expert) pairs by expert, so that each expert's tokens are contiguous. The stable sort
        # keeps them in the order of the batch, which fixes the order of the sums.
        expert_of_pair = top_k_index.reshape(-1)
        order = expert_of_pair.argsort(stable=True)
        # Under expert parallelism, pairs of other ranks' experts have the index num_experts: they sort last, are cut.
        counts = torch.bincount(expert_of_pair, minlength=self.num_experts).tolist()[: self.num_experts]
        return order[: sum(counts)], counts

    def _expert(self, e: int, x: Tensor, rows: Rows | None) -> Tensor:
        gate, up = _call(self.gate_up_proj[e], x, rows).chunk(2, dim=-1)
        return _call(self.down_proj[e], self.act_fn(gate) * up, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenExperts:
        """Move or cast the linears, and release the 3-D parameters if the weights no longer are views of them."""
        super()._apply(fn, recurse)
        if not self._aliased():
            for name in NAMES:
                self._fused[0]._parameters[name] = None
        return self

    def _aliased(self) -> bool:
        """True if every linear's weight is still a view of its 3-D parameter."""
        for name in NAMES:
            parameter: Any = self._fused[0]._parameters[name]
            if parameter is None or parameter.is_meta:
                return False
            for e, layer in enumerate(getattr(self, name)):
                if layer.weight.data_ptr() != parameter[e].data_ptr() or layer.weight.dtype != parameter.dtype:
                    return False
        return True

    def closed(self) -> nn.Module:
        """transformers' own module with the linears' current weights."""
        fused = self._fused[0]
        if not self._aliased():
            for name in NAMES:
                weights = torch.stack([layer.weight.detach() for layer in getattr(self, name)])
                fused._parameters[name] = nn.Parameter(weights, requires_grad=False)
        return fused.train(self.training)


def _call(layer: nn.Module, x: Tensor, rows: Rows | None) -> Tensor:
    """A linear's result; a layer with adapters gets the adapter names as well."""
    result: Tensor = layer(x) if rows is None or type(layer) is nn.Linear else layer(x, adapter_names=rows)
    return result


def is_target(name: str, target_parameters: list[str]) -> bool:
    """True if a parameter's name is one of the targets or ends with a dot and one."""
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def is_slice_of_target(name: str, target_parameters: list[str]) -> bool:
    """True if a module's name is that of a target's matrix: `...gate_up_proj.3`."""
    parameter, _, index = name.rpartition(".")
    return index.isdecimal() and is_target(parameter, target_parameters)


def parameter_of(name: str) -> str | None:
    """The name of the 3-D parameter that an expert's linear `...gate_up_proj.3` is a slice of; None for other names."""
    match = re.fullmatch(rf"(.*\.(?:{'|'.join(NAMES)}))\.\d+", name)
    return match.group(1) if match else None


def close(model: nn.Module) -> None:
    """Put the modules back where no expert and no parameter has an adapter."""
    for path, module in reversed(list(model.named_modules())):  # inner ones first
        if isinstance(module, OpenParameters) and not module.adapted():
            model.set_submodule(path, module.base_layer)
        if isinstance(module, OpenExperts) and all(type(m) is nn.Linear for n in NAMES for m in getattr(module, n)):
            model.set_submodule(path, module.closed())
