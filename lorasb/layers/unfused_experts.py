"""Experts whose weights are 3-D parameters: opened into a linear layer for each, which an adapter can take.

    gate_up_proj [E, 2·I, H], down_proj [E, H, I]:  y_t = Σ_e p_te · D_e (act(g)·u),  [g, u] = G_e x_t

Each expert gets its own A, R and B, filled from the tokens that were routed to it. The weights are views of the
parameters, so that opening costs no memory.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .token_rows import Rows

NAMES = ("gate_up_proj", "down_proj")  # in the order in which the parameters are registered


class OpenExperts(nn.Module):
    """Experts with a linear layer for each: `gate_up_proj.0`, ..., `down_proj.0`, ...

    Args:
        whole: transformers' experts, which `closed` gives back.

    Forward: x [T, H], the chosen experts [T, k] and their weights [T, k] -> y [T, H].
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(getattr(whole, NAMES[0]))
        self.act_fn: Any = whole.act_fn
        self._whole = [whole]  # not a child: its parameters are the experts' own
        self.training = whole.training
        for name in NAMES:
            weights = getattr(whole, name).detach()
            setattr(self, name, nn.ModuleList(_linear(weight) for weight in weights))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Rows | None = None
    ) -> Tensor:
        """y [T, H], the experts' results weighted and added up; `adapter_names` says what each token asks for."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        tokens = order // top_k_index.shape[-1]
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        own = counts[: self.num_experts]  # another process's experts have the next number
        tokens, order = tokens[: sum(own)], order[: sum(own)]
        y = torch.zeros_like(hidden_states)
        everyone = self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
        taken = [e for e, count in enumerate(own) if count or everyone]  # ranks reduce the gradients of the same Rs
        if not taken:
            return y
        counts = [own[e] for e in taken]
        parts, places = hidden_states[tokens].split(counts), tokens.split(counts)
        names = [None if adapter_names is None else adapter_names.taken(place) for place in places]
        results = torch.cat([self._expert(*each) for each in zip(taken, parts, names, strict=True)])
        weighted = results * top_k_weights.reshape(-1)[order, None]
        return y.index_add(0, tokens, weighted.to(y.dtype))

    def _expert(self, e: int, x: Tensor, rows: Rows | None) -> Tensor:
        gate, up = _call(self.gate_up_proj[e], x, rows).chunk(2, dim=-1)  # type: ignore[index,arg-type]
        return _call(self.down_proj[e], self.act_fn(gate) * up, rows)  # type: ignore[index,arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> OpenExperts:
        """Moves take the linears along; the parameters that they were views of are let go."""
        super()._apply(fn, recurse)
        if not self._aliased():
            for name in NAMES:
                self._whole[0]._parameters[name] = None
        return self

    def _aliased(self) -> bool:
        """Whether every linear is still a view of its parameter."""
        for name in NAMES:
            parameter: Any = self._whole[0]._parameters[name]
            if parameter is None or parameter.is_meta:
                return False
            for e, layer in enumerate(getattr(self, name)):
                if layer.weight.data_ptr() != parameter[e].data_ptr() or layer.weight.dtype != parameter.dtype:
                    return False
        return True

    def closed(self) -> nn.Module:
        """transformers' own module, with the weights as they are now."""
        whole = self._whole[0]
        if not self._aliased():
            for name in NAMES:
                weights = torch.stack([layer.weight.detach() for layer in getattr(self, name)])
                whole._parameters[name] = nn.Parameter(weights, requires_grad=False)
        return whole.train(self.training)


def _call(layer: nn.Module, x: Tensor, rows: Rows | None) -> Tensor:
    """A linear's result; one that has adapters gets the names, too."""
    given = {} if rows is None or type(layer) is nn.Linear else {"adapter_names": rows}
    result: Tensor = layer(x, **given)
    return result


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def open_targets(model: nn.Module, target_parameters: list[str]) -> list[str]:
    """Open the experts that have a parameter of one of these names (matched by suffix); returns what matched.

    Raises:
        ValueError: a name that no parameter has.
        TypeError: experts of another layout.
    """
    matched: dict[str, bool] = dict.fromkeys(target_parameters, False)
    found: list[str] = []
    for path, module in list(model.named_modules()):
        names = NAMES if isinstance(module, OpenExperts) else [n for n, _ in module.named_parameters(recurse=False)]
        wanted = [f"{path}.{name}" for name in names if is_target(f"{path}.{name}", target_parameters)]
        for full in wanted:
            matched |= {target: True for target in target_parameters if is_target(full, [target])}
        if wanted and not isinstance(module, OpenExperts):
            _check(path, module, wanted)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, OpenExperts(module))
        found += wanted
    missing = [target for target, there in matched.items() if not there]
    if missing:
        raise ValueError(
            f"target_parameters: no parameter is called {', '.join(missing)}. Experts have "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; plain linears belong into target_modules"
        )
    return found


def is_target(name: str, target_parameters: list[str]) -> bool:
    """Whether a parameter's name is one of these, or ends with one."""
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def parameter_of(name: str) -> str | None:
    """The parameter that an expert's linear `...gate_up_proj.3` is a part of; None for another layer's name."""
    match = re.fullmatch(rf"(.*\.(?:{'|'.join(NAMES)}))\.\d+", name)
    return match.group(1) if match else None


def close(model: nn.Module) -> None:
    """Put transformers' own modules back where no adapter is left."""
    for path, module in list(model.named_modules()):
        if isinstance(module, OpenExperts) and all(type(m) is nn.Linear for n in NAMES for m in getattr(module, n)):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.closed())


def _check(path: str, module: nn.Module, wanted: list[str]) -> None:
    kind = type(module).__name__
    if [name for name, _ in module.named_parameters(recurse=False)] != list(NAMES) or not _computes_alike(module):
        raise TypeError(
            f"target_parameters: {wanted[0]} belongs to a {kind}, whose experts are laid out or computed in another "
            f"way than Mixtral's and Qwen3-MoE's, the ones that lorasb opens. Leave {path} out of target_parameters"
        )
    for name in NAMES:
        weights = getattr(module, name)
        if weights.dim() != 3 or not weights.is_floating_point() or type(weights.data) is not Tensor:
            raise TypeError(f"expected {path}.{name} [experts, out, in] in 16 or 32 bits, got {list(weights.shape)}")


def _computes_alike(module: nn.Module) -> bool:
    """Whether a class's forward is Mixtral's or Qwen3-MoE's, instruction for instruction: many families share it."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def code(kind: Any) -> tuple[Any, ...]:
        found = inspect.unwrap(kind.forward).__code__
        return found.co_code, found.co_names, found.co_consts[1:]

    own = code(type(module))
    return not getattr(module, "is_transposed", False) and own in (code(MixtralExperts), code(Qwen3MoeExperts))
