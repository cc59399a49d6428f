"""State of the adapters in a layer: settings, A, R and B by name, R's gradient, and the adapter of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..config.adapter import AdapterOptions
from ..constants import BASE_ROW
from ..utils.precision import SIXTEEN_BIT


def check_name(adapter_name: object) -> None:
    """Raise a ValueError for an invalid adapter name."""
    # Names are keys of ParameterDicts, so they must differ from a ParameterDict's methods and attributes.
    is_text = isinstance(adapter_name, str) and adapter_name != "" and "." not in adapter_name
    if not is_text or adapter_name == BASE_ROW or hasattr(nn.ParameterDict(), str(adapter_name)):
        raise ValueError(
            f"expected a name without dots for each adapter, not {BASE_ROW} or an attribute of ParameterDict, got "
            f"{adapter_name!r}"
        )


@dataclass(kw_only=True)
class AdapterState(AdapterOptions):
    """The state of one adapter in a layer."""

    r: int  # rank
    scaling: float  # s
    made_with: float  # the original s
    # whether A, R and B have values; read `AdaptedLayer.is_initialized` instead, which also detects loaded values
    initialized: bool = False
    basis: str | None = None  # the adapter whose A and B it uses; None if it has its own
    cast_from: tuple[bytes, bytes] | None = None  # digests of A and B: after the cast, and as in their file
    # Theorem 3's matrices, after a key of the A, B and s that they were computed from; None if not computed yet
    preconditioner: tuple[object, Tensor, Tensor] | None = field(default=None, repr=False)


class Scales(dict[str, float]):
    """The s by adapter name; assigning to an entry sets the adapter's s, as in PEFT's layers."""

    def __init__(self, adapters: dict[str, AdapterState], check: Callable[[str], None]) -> None:
        super().__init__({name: state.scaling for name, state in adapters.items()})
        self._adapters, self._check = adapters, check  # the function raises for an adapter that must keep its s

    def __setitem__(self, name: str, scaling: float) -> None:
        self._check(name)
        self._adapters[name].scaling = scaling
        super().__setitem__(name, scaling)


class EquivalentGradient(torch.autograd.Function):
    """The identity on R, whose backward maps g to left·g·right (all [r, r])."""

    @staticmethod
    def forward(ctx: FunctionCtx, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return left @ grad @ right, None, None


def refuse_training(core: Tensor, name: str, training: bool) -> Tensor:
    """Raise for an uninitialized adapter in training mode; else return a view of R whose gradient raises."""
    # Evaluating an uninitialized adapter is legitimate and gives the base's result, with gradients enabled or not.
    error = RuntimeError(
        f"adapter {name!r} has not been initialized: its A, B and R are zero and would learn nothing. "
        "Call lorasb.initialize(model, dataloader, lr=...) before training, or load a saved adapter"
    )
    if training:
        raise error

    def raise_error(_: Tensor) -> None:
        raise error

    core = core.view_as(core)  # a hook on the parameter itself would outlive this forward and pile up
    core.register_hook(raise_error)
    return core


def has_values(a: Tensor) -> bool:
    """Return False if A is all zeros: its adapter was saved before it was initialized."""
    a = a.detach()
    a = a.to_local() if hasattr(a, "to_local") else a  # a DTensor's own shard
    return a.is_meta or a.numel() == 0 or bool(a.any())


class FrozenFactors(nn.ParameterDict):
    """A or B by adapter name, never requiring gradients; the layer casts them (`AdaptedLayer.cast_factors`)."""

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield a shared tensor under the name of every adapter that has it, as FSDP2's checkpoints need each name."""
        return super().named_parameters(prefix, recurse, remove_duplicate=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFactors:
        """Move A or B without a cast, which would round factors that stay in fp32."""

        def move_only(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(move_only, recurse)
        return self


class Cores(nn.ParameterDict):
    """R by adapter name; never in 16 bits, which would round small updates away, unless requested."""

    def __init__(self) -> None:
        super().__init__()
        self.stored_16bit: set[str] = set()  # adapters whose R may have 16 bits: PEFT's `autocast_adapter_dtype=False`

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Parameter) and value.dtype in SIXTEEN_BIT and name not in self.stored_16bit:
            marks = vars(value)  # set from outside, such as transformers' loaded flag
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            vars(value).update(marks)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        """Move R; a cast to 16 bits (`model.to(torch.bfloat16)`) only changes its device."""

        # `_apply` may set `parameter.data` in place, which does not pass through `__setattr__`.
        def move_only(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.dtype in SIXTEEN_BIT else new

        super()._apply(move_only, recurse)
        return self


TOKENS_FIRST = ("fsmt", "led", "longformer", "xlnet")  # `config.model_type` of models whose layers get [T, B, in]


def length_mismatch(inputs: int, names: int) -> str:
    """Return PEFT's message for adapter_names of the wrong length, plus the fix."""
    return (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {names} and {inputs} "
        "respectively: give one name per row of the batch, and pass num_beams or num_return_sequences to generate()"
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """The adapter name of each of n rows.

    A layer may get the batch's rows [B, ...] or their tokens flattened [B·T, in]. Other layers reorder or select
    tokens, so a matching number of rows would be a coincidence.
    """

    names: tuple[str, ...]  # the distinct names
    index: Tensor  # [n], int64 on the CPU: each row's index into `names`
    slots: Tensor | None = None  # [names], int64: each name's slot in the bank, or -1; None without a bank
    basis: str = ""  # the adapter whose A, B and trained modules the bank's adapters use

    @classmethod
    def of(cls, names: Sequence[str]) -> Rows:
        """Rows from a list with one name per row."""
        distinct = tuple(sorted(set(names)))
        return cls(distinct, torch.tensor([distinct.index(name) for name in names], dtype=torch.int64, device="cpu"))

    def __len__(self) -> int:
        return self.index.shape[0]  # not len(): torch's takes microseconds, and every layer calls this

    def __eq__(self, other: object) -> bool:
        """True if both have the same name for every row."""
        return isinstance(other, Rows) and self.names == other.names and torch.equal(self.index, other.index)

    # Cached, as every layer reads it: all layers share the batch's `Rows`.
    @cached_property
    def places(self) -> Tensor | None:
        """[n]: each row's slot in the bank, or -1; None without a bank."""
        return None if self.slots is None else self.slots[self.index]

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Names that are not in the bank."""
        if self.slots is None:
            return self.names
        return tuple(name for name, slot in zip(self.names, self.slots.tolist(), strict=True) if slot < 0)

    def to_list(self) -> list[str]:
        """One name per row; adapters in a bank are listed as their basis."""
        others = set(self.others)
        return [name if name in others else self.basis for name in (self.names[i] for i in self.index.tolist())]

    def select(self, rows: Tensor) -> Rows:
        """The names of a subset of the rows, in the order of the indices `rows` [k]."""
        return replace(self, index=self.index[rows.to(self.index.device)])

    def repeat_interleave(self, repeats: int) -> Rows:
        """Repeat each row's name `repeats` times in succession, as for flattened tokens or for beams."""
        return replace(self, index=self.index.repeat_interleave(repeats))


def chooses_tokens(name: str) -> bool:
    """True if a module's name indicates a routed expert, which gets only some of the tokens."""
    # Shared experts get all tokens.
    return any("expert" in component and "shared" not in component for component in name.split("."))


def rows_of(x: Tensor, rows: Rows, outer: torch.Size | None, tokens_first: bool) -> Rows | None:
    """The names for the rows of a layer's input x [n, ..., in]; None if the mapping is ambiguous."""
    if len(rows.names) == 1:  # any selection or order of tokens has the same name
        fits = x.dim() == 2 or tokens_first or len(x) % len(rows) == 0
        return replace(rows, index=rows.index[:1].expand(len(x))) if fits else None
    if x.dim() > 2:
        # With B = T, [B, T, in] and [T, B, in] have the same shape; the strides of a transpose reveal the latter.
        unclear = x.shape[0] == x.shape[1] and (tokens_first or x.stride(0) < x.stride(1))
        return rows if len(x) == len(rows) and not unclear else None
    if outer is not None and outer[0] == len(rows) and len(x) == outer[0] * outer[1]:  # flattened to [B·T, in]
        return rows.repeat_interleave(outer[1])
    return rows if len(x) == len(rows) else None
