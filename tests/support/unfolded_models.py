"""A small network of an embedding, convolutions with and without groups, attention and a linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TARGETS = ["embed", "conv", "grouped", "image", "attention", "head"]
# the parameter behind each layer of an adapter, by the layer's name
PARAMETERS = {name: f"{name}.weight" for name in ("embed", "conv", "grouped", "image", "head")}
PARAMETERS |= {"attention": "attention.in_proj_weight", "attention.base_layer": "attention.out_proj.weight"}


class Net(nn.Module):
    """Token ids [n, t] -> [n, t, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 12, 3, padding=2, dilation=2, groups=3, padding_mode="circular", bias=False)
        self.image = nn.Conv2d(1, 6, (3, 2), padding=(1, 0), stride=(1, 2))
        self.attention = nn.MultiheadAttention(36, 3, batch_first=True)
        self.head = nn.Linear(36, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.conv(self.embed(ids).transpose(1, 2)).tanh()).transpose(1, 2)  # [n, t, 12]
        x = self.image(x.unsqueeze(1)).transpose(1, 2).flatten(2)  # [n, t, 36]
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


def batch(seed: int = 0, rows: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 20, (rows, 7), generator=g), "target": torch.randn(rows, 7, 4, generator=g)}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["ids"]) - batch["target"]).square().mean()
