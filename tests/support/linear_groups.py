"""Models whose layers are computed together, the same models without groups, and one step of each."""

import copy

import tolerances
import torch
from adapters import layers
from models import batches_for
from torch import Tensor, nn

import lorasb
from lorasb.layers import linear_group


def step(
    model: nn.Module, family: str = "llama", backend: str = "eager", rows: int = 2, tokens: int = 12, **options: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every R."""
    model.zero_grad()
    with lorasb.backend(backend):
        out = model(**batches_for(family, 1, rows, tokens)[0], **options)
        out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if "lorasb_R" in n}


def groups(model: nn.Module) -> list[linear_group.FusedGroup]:
    """The groups of layers that are computed together."""
    found = [layer.fused_output.__self__ for layer in layers(model).values() if layer.fused_output is not None]
    return [group for group in dict.fromkeys(found) if len(group.names) > 1]


def sizes(model: nn.Module) -> list[int]:
    return [len(group.names) for group in groups(model)]


def alone(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    linear_group.detach(model)
    return model


def same(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    tolerances.check(first[0], second[0], tolerances.PROCESS_SUMS)
    assert first[1].keys() == second[1].keys()
    tolerances.check(list(first[1].values()), [second[1][name] for name in first[1]], tolerances.PROCESS_SUMS)


def attention(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0].self_attn


def prepared(module: nn.Module, features: int) -> nn.Module:
    """Adapt a module's linears, with factors that have an effect."""
    model = lorasb.patch(module, r=3, target_modules="all-linear")
    for layer in layers(model).values():
        q = torch.linalg.qr(torch.randn(features, 3)).Q
        layer.set_factors("default", q, torch.randn(3, 3), q.t())
    return model


class Two(nn.Module):
    """A parent of two layers that share x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.raises: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x)
        if self.raises is not None:
            raise self.raises
        return y + self.k_proj(x)
