"""Parameters of any module under adapters, 2-D or 3-D: GPT-OSS's and Llama-4's experts, weights without a linear.

A 3-D parameter [E, a, b] has an adapter of each of its E matrices. While the module computes, W_e + s·B_e R_e A_e of
all of them stand in the parameter's place: a copy of it, as PEFT's LoRA makes one too. Experts that are computed as
Mixtral's are opened into linears instead (`unfused_experts`), without a copy.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .parameter_slice import ParameterSlice
from .weight_adapter import LoRASBWeight


class OpenParameters(nn.Module):
    """A module with a `ParameterSlice` for each matrix of some of its parameters, under the parameter's own name.

    Args:
        base_layer: the module.
        names: of its parameters, 2-D or 3-D.

    Forward: that of the module.
    """

    def __init__(self, base_layer: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        for name in names:
            parameter = base_layer.get_parameter(name)
            indices = range(len(parameter)) if parameter.dim() == 3 else [None]
            # not add_module, which asks `hasattr` first: attributes of the module itself answer there
            self._modules[name] = nn.ModuleList(ParameterSlice(base_layer, name, index) for index in indices)

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of the parameters that have slices."""
        return tuple(name for name in self._modules if name != "base_layer")

    def open(self, names: list[str]) -> None:
        """Open further parameters of the module."""
        for name in [name for name in names if name not in self.opened]:
            self._modules[name] = OpenParameters(self.base_layer, [name])._modules[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the adapters of its parameters."""
        for layer in self._adapted():
            layer.unmerge_if_disabled()
        weights = {name: self._weight(name) for name in self.opened if self._in_use(name)}
        return functional_call(self.base_layer, weights, args, kwargs) if weights else self.base_layer(*args, **kwargs)

    def slices(self, name: str) -> list[nn.Module]:
        """The matrices of a parameter, with or without adapters."""
        return list(cast(nn.ModuleList, self._modules[name]))

    def _adapted(self) -> list[LoRASBWeight]:
        return [one for name in self.opened for one in self.slices(name) if isinstance(one, LoRASBWeight)]

    def _in_use(self, name: str) -> bool:
        return any(isinstance(one, LoRASBWeight) and one.in_use for one in self.slices(name))

    def _weight(self, name: str) -> Tensor:
        matrices = [
            one.current_weight() if isinstance(one, LoRASBWeight) else cast(ParameterSlice, one).weight
            for one in self.slices(name)
        ]
        whole = self.base_layer.get_parameter(name).dim() == 2
        return matrices[0] if whole else torch.stack(matrices)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without adapters, merged first if so asked; PEFT calls it in place of `merge`."""
        for layer in self._adapted() if merge else ():
            layer.merge(safe_merge, adapter_names)
        return self.base_layer

    @property
    def is_free(self) -> bool:
        """True if no adapter is left."""
        return all(isinstance(one, ParameterSlice) for name in self.opened for one in self.slices(name))

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)


def close(model: nn.Module) -> None:
    """Put the modules back where no parameter has an adapter."""
    for path, module in list(model.named_modules()):
        if isinstance(module, OpenParameters) and module.is_free:
            model.set_submodule(path, module.base_layer)
