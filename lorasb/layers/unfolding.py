"""Modules whose parameter is seen as a matrix W [out, in]: embeddings, convolutions, attention, slices of parameters.

An embedding is a linear of one-hot rows: its weight [num, dim] is Wᵀ. A convolution's weight [out, in/groups, k...] is
W with in = in/groups·k, as PEFT's LoRA unfolds it. Attention has W of q, k and v together, [3·dim, dim], and that of
its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .parameter_slice import ParameterSlice

EMBEDDING, CONVOLUTION, ATTENTION, SLICE = "embedding", "convolution", "attention", "parameter"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS_WITH_WEIGHT = (nn.Embedding, *CONVOLUTIONS)


@dataclass(frozen=True)
class Unfolding:
    """A parameter seen as a matrix.

    Attributes:
        kind: of the module.
        path: name of the parameter in the module.
        stored: its shape.
    """

    kind: str
    path: str
    stored: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.kind == EMBEDDING:
            return self.stored[1], self.stored[0]
        return self.stored[0], int(torch.Size(self.stored[1:]).numel())

    def matrix(self, weight: Tensor) -> Tensor:
        """W [out, in] of the stored weight, or of its gradient."""
        return weight.t() if self.kind == EMBEDDING else weight.flatten(1)

    def folded(self, matrix: Tensor) -> Tensor:
        """The stored layout of a matrix [out, in]."""
        return matrix.t() if self.kind == EMBEDDING else matrix.reshape(self.stored)

    def described(self, groups: int) -> list[Any]:
        """[kind, path, groups, *shape], for JSON."""
        return [self.kind, self.path, groups, *self.stored]


def unfoldings(module: nn.Module) -> list[Unfolding]:
    """The parameters of a module that are adapted, innermost first; none for modules of other kinds.

    None of these: attention whose keys or values have widths of their own, as it keeps three matrices; weights that
    are computed in every forward (weight_norm, spectral_norm); embeddings that rescale what they look up (max_norm).
    """
    if isinstance(module, ParameterSlice):
        return [Unfolding(SLICE, "weight", tuple(module.weight.shape))]
    weight: Any = module._parameters.get("weight")
    if isinstance(module, KINDS_WITH_WEIGHT) and (weight is None or getattr(module, "max_norm", None) is not None):
        return []
    if isinstance(module, nn.Embedding):
        return [Unfolding(EMBEDDING, "weight", tuple(weight.shape))]
    if isinstance(module, CONVOLUTIONS):
        return [Unfolding(CONVOLUTION, "weight", tuple(weight.shape))]
    if isinstance(module, nn.MultiheadAttention) and module._parameters.get("in_proj_weight") is not None:
        paths = {"out_proj.weight": module.out_proj.weight, "in_proj_weight": module.in_proj_weight}
        return [Unfolding(ATTENTION, path, tuple(weight.shape)) for path, weight in paths.items()]
    return []
