"""Small networks not from transformers: linears, layers whose W is not a matrix, and a mixture of experts."""

import torch
from torch import Tensor, nn

TARGETS = ["embed", "conv", "grouped", "image", "attention", "head"]
# the parameter that each adapted layer wraps, by the layer's name
PARAMETERS = {name: f"{name}.weight" for name in ("embed", "conv", "grouped", "image", "head")}
PARAMETERS |= {"attention": "attention.in_proj_weight", "attention.base_layer": "attention.out_proj.weight"}


class Mlp(nn.Module):
    """Three linears, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(10, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))  # for `Mlp`


class Net(nn.Module):
    """Token ids [n, t] -> [n, t, 4]: an embedding, convolutions with and without groups, attention and a linear."""

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


def batch(seed: int = 0) -> dict[str, Tensor]:
    """A batch for `Net`."""
    g = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 20, (6, 7), generator=g), "target": torch.randn(6, 7, 4, generator=g)}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of `Net`."""
    return (model(batch["ids"]) - batch["target"]).square().mean()


class Experts(nn.Module):
    """A mixture of experts: the router sends every token to the first two, and none to the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the outputs of the experts that get tokens."""
        self.experts[3](x[:0])  # zero tokens, as in loops over all experts
        return x + sum(torch.tanh(expert(x)) for expert in self.experts[:2])


class Mixture(nn.Module):
    """Two blocks of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A squared error as "loss"."""
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x.mean(-1) - labels).square().mean()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a model that returns a dictionary."""
    return model(**batch)["loss"]
