"""A small mixture of experts that is no transformers model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A mixture of experts: the router sends every token to the first two, and none to the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the experts that were routed to."""
        self.experts[3](x[:0])  # as loops over all experts do
        return x + sum(torch.tanh(expert(x)) for expert in self.experts[:2])


class Mixture(nn.Module):
    """Two blocks of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A squared error."""
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x.mean(-1) - labels).square().mean()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]
