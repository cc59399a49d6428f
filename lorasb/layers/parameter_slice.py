"""`ParameterSlice`: a parameter of another module, or one matrix of it, as a module that can have an adapter."""

from __future__ import annotations

from torch import Tensor, nn


class ParameterSlice(nn.Module):
    """A view of a parameter W [a, b], or of the e-th matrix of one [E, a, b]; it holds no tensor of its own.

    Args:
        owner: the module that has the parameter.
        name: of the parameter.
        index: e, or None for the whole of a 2-D parameter.
    """

    def __init__(self, owner: nn.Module, name: str, index: int | None) -> None:
        super().__init__()
        self._owner = [owner]  # in a list: as a submodule its parameters would count once a slice
        self.name, self.index = name, index
        self.training = owner.training

    @property
    def weight(self) -> Tensor:
        """The matrix, in the parameter's memory."""
        parameter = self._owner[0].get_parameter(self.name)
        return parameter if self.index is None else parameter[self.index]
