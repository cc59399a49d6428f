"""`Bases`: adapters of a layer that have the A and B of another one, the same tensors, as neither is trained."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class Bases:
    """The part of `LoRASBLinear` that knows which adapters share factors, and with which."""

    basis: dict[str, str]  # of adapters that have another one's A and B: its name
    stored_cores: Any
    lorasb_A: Any  # noqa: N815  as PEFT names factors
    lorasb_B: Any  # noqa: N815
    lorasb_R: Any  # noqa: N815
    r: dict[str, int]
    scaling: dict[str, float]
    first_scaling: dict[str, float]
    other_param_names: tuple[str, ...]
    _preconditioners: dict[str, Any]
    initialized: dict[str, bool]
    wide_factors: dict[str, bool]

    def stand_on(self, adapter_name: str, basis: str) -> None:
        """Give an adapter the A and B of another one."""
        self.basis[adapter_name], self.initialized[adapter_name] = basis, self.is_initialized(basis)
        self.wide_factors[adapter_name] = self.wide_factors[basis]
        for factors in (self.lorasb_A, self.lorasb_B):
            factors[adapter_name] = factors[basis]

    def copy_adapter(self, adapter_name: str, name: str) -> None:
        """Add an adapter like another one on a basis: the same A and B, and a copy of R, which does not train yet."""
        tables = [getattr(self, table) for table in self.other_param_names]  # A, B and all but R, by adapter
        try:
            for values in tables:
                if adapter_name in values:
                    values[name] = values[adapter_name]
            if adapter_name in self.lorasb_R.stored_16bit:
                self.lorasb_R.stored_16bit.add(name)
            self.lorasb_R[name] = nn.Parameter(self.lorasb_R[adapter_name].detach().clone(), requires_grad=False)
        except BaseException:  # Ctrl-C, too
            self.lorasb_R.stored_16bit.discard(name)
            for values in (*tables, self.lorasb_R):
                with suppress(KeyError, AttributeError):  # a ParameterDict may have the key, and no parameter yet
                    del values[name]
            raise

    def move_to_basis(self, adapter_name: str, basis: str, core: Tensor) -> None:
        """Give an adapter the A, B, rank and s of another one, and an R [r, r]; dropout and all else stays."""
        old = self.lorasb_R[adapter_name]
        self.stand_on(adapter_name, basis)
        self.r[adapter_name] = self.r[basis]
        self.scaling[adapter_name] = self.first_scaling[adapter_name] = self.scaling[basis]
        self._preconditioners.pop(adapter_name, None)
        new = core.to(old.device, self.lorasb_R[basis].dtype)
        self.lorasb_R[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def leave_basis(self, adapter_name: str) -> None:
        """Give an adapter that stands on another one copies of these A and B."""
        if self.basis.pop(adapter_name, None) is not None:
            for factors in (self.lorasb_A, self.lorasb_B):
                factors[adapter_name] = nn.Parameter(factors[adapter_name].detach().clone(), requires_grad=False)

    def share_again(self, adapter_name: str) -> None:
        """Undo what a loader or a change of dtype does, which put tensors of its own in the place of shared ones."""
        for name, basis in self.basis.items():
            if adapter_name in (name, basis) and self.lorasb_A[name] is not self.lorasb_A[basis]:
                self.stand_on(name, basis)

    def serves_bank(self, adapter_name: str) -> bool:
        """True if a bank's adapters have this one's A and B."""
        return self.stored_cores is not None and bool(self.stored_cores.basis == adapter_name)

    def is_initialized(self, name: str) -> bool:
        """True if an adapter was initialized, or loaded from one that was."""
        raise NotImplementedError
