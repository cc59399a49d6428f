"""Sums of weight gradients from hooks: `dyᵀ x` in fp32, without any weight that requires a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class GradientSums:
    """Adds up `dyᵀ x` [out, in] of linear layers while their outputs are differentiated.

    A context manager: hooks are there inside the block only. Outputs that no graph reaches yet are made leaves that
    require a gradient, so backward arrives at every layer although all weights are frozen.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> GradientSums:
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = inputs[0].detach()
            if not output.requires_grad:
                output = output.detach().requires_grad_(True).clone()
            output.register_hook(lambda dy: self._add(name, dy, x))
            return output.view_as(output)  # what others hook (the loss rescales logits) comes before our hook

        return forward

    @torch.no_grad()
    def _add(self, name: str, dy: Tensor, x: Tensor) -> None:
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        left, right = dy.reshape(-1, dy.shape[-1]).to(wide).t(), x.reshape(-1, x.shape[-1]).to(wide)
        total = self.sums.get(name)
        if total is None:
            self.sums[name] = left @ right
        else:
            total.add_(left @ right)
