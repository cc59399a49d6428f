"""Operands of the adapted linear: their structure, autocast, the signature of a call, and the checks of a new one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..compat import torch as private
from ..constants import MAX_RANK
from ..utils.precision import FLOATS

DENSE = (0, 0, 0)  # `layout` of W's that are not quantized; not (), which torch takes for a list of tensors
PLAIN = (Tensor, torch.nn.Parameter)
MAX_SIGNATURES = 1 << 12  # cached ones, up to 4 KB each; every number of tokens adds one per layer shape


class Member(NamedTuple):
    """One layer's operands."""

    base: Tensor | tuple[list[Tensor], list[int]] | None  # W [m, n], (tensors, layout) of a quantized one, or None
    a: Tensor  # [r, n]
    core: Tensor  # R [r, r], or [K, r, r] with an index
    b: Tensor  # [m, r]
    bias: Tensor | None  # [m]
    scaling: float
    seed: Tensor | None  # [1], of the dropout mask


class Operands(NamedTuple):
    """The op's arguments other than x [..., n], in their order."""

    base: Sequence[Tensor]  # W_j of each member; the tensors of one quantized W; or empty
    # [block, nested block, rounding] of a quantized W, else `DENSE`. W is rounded to the dtype that rounding names
    # before it is cast to x's: 0 none, 1 bf16, 2 fp16.
    layout: Sequence[int]
    a: Sequence[Tensor]  # [r, n]
    cores: Sequence[Tensor]  # R [r, r]; with an index [K, r, r]: x[i] uses R[row_index[i]], or only the base for -1
    b: Sequence[Tensor]  # [m_j, r]
    biases: Sequence[Tensor]  # or empty
    scalings: Sequence[float]
    row_index: Tensor | None = None  # [k], int64 on the CPU, so that a wrong index raises before any R is read
    dropout: float = 0.0  # probability; 0 with an index
    seeds: Tensor | None = None  # [members], int64 on the CPU

    @property
    def is_quantized(self) -> bool:
        return self.layout[1] != 0

    def members(self) -> list[Member]:
        """The operands of each layer."""
        count = len(self.a)
        bases: Sequence[object] = self.base or [None] * count
        if self.is_quantized:
            bases = [(list(self.base), list(self.layout))]
        biases: Sequence[object] = self.biases or [None] * count
        seeds: Sequence[object] = [None] * count
        if self.seeds is not None:
            seeds = [self.seeds] if count == 1 else self.seeds.split(1)
        return list(map(Member, bases, self.a, self.cores, self.b, biases, self.scalings, seeds))

    def select(self, members: Sequence[int]) -> Operands:
        """The operands of some members, without biases."""
        fields = self.base, self.a, self.cores, self.b, self.scalings
        base, a, cores, b, scalings = ([field[j] for j in members] if field else [] for field in fields)
        seeds = None if self.seeds is None else self.seeds[list(members)]
        return Operands(base, self.layout, a, cores, b, [], scalings, self.row_index, self.dropout, seeds)  # type: ignore[arg-type]


def autocast_on(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off if it is on for the tensor's device: the arguments were cast before the op."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if autocast_on(kind) else nullcontext()


def cast_lists(x: Tensor, lists: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
    """Cast x and lists of tensors as autocast casts the arguments of `F.linear`; fp64 stays."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast_one(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast_one(x), [list(map(cast_one, tensors)) for tensors in lists]


def is_transformed() -> bool:
    """True under a functorch transform (`torch.func`) or forward-mode AD, for which the ops have no rules."""
    return private.transforms_active() or private.forward_level() >= 0


def is_captured() -> bool:
    """True while a graph is captured that may run with gradients: `torch.export`, `make_fx`, `torch.jit.trace`."""
    if torch.compiler.is_compiling():  # torch.compile captures again for another grad mode
        return torch.compiler.is_exporting()
    return private.dispatch_modes() > 0 or private.tracing_state() is not None


def metadata_in_python(*operands: Tensor | Sequence[Tensor | None] | None) -> Hashable:
    """Return dtype, device, shape and strides of tensors, lists of them and None; None if there is anything else."""
    found: list[Hashable] = []
    for operand in operands:
        is_list = type(operand) in (list, tuple)
        tensors = cast(Sequence[Tensor | None], operand if is_list else (operand,))
        if is_list:  # its length first, so that different sequences of operands differ
            found.append(len(tensors))
        for tensor in tensors:
            if tensor is None:
                found.append(None)
            elif type(tensor) in PLAIN and tensor.layout is torch.strided and not (tensor.is_neg() or tensor.is_nested):
                found += tensor.dtype, tensor.device, tensor.shape, tensor.stride()
            else:
                return None
    return tuple(found)


# The extension replaces this and `signature_of` with equivalent functions, which are ten times as fast.
metadata: Callable[..., Hashable] = metadata_in_python


def signature_in_python(x: Tensor, *others: Tensor | Sequence[Tensor | None] | None) -> Hashable:
    """Return the metadata of a call's operands; None, too, if a mode, a transform or torch.jit.trace intercepts ops."""
    # The dispatcher would unwrap such an x, or fill it with zeros, before calling a kernel.
    unwrapped = type(x) not in PLAIN or not (
        private.is_wrapped(x) or private.is_zerotensor(x) or private.is_functional(x)
    )
    intercepted = private.dispatch_modes() or private.function_modes() or private.tracing_state() is not None
    return metadata_in_python(x, *others) if unwrapped and not (intercepted or is_transformed()) else None


signature_of: Callable[..., Hashable] = signature_in_python
known: set[Hashable] = set()  # signatures that have passed `check`


def remember(signature: Hashable) -> None:
    """Add a signature to the known ones, which are cleared when full."""
    if len(known) >= MAX_SIGNATURES:
        known.clear()
    known.add(signature)


def check(x: Tensor, lists: tuple[Sequence[Tensor], ...], scalings: Sequence[float], index: Tensor | None) -> None:
    """Raise an error if the operands of a call do not match."""
    weights, a, cores, b, biases = lists  # weights (checked elsewhere if quantized) and biases may be empty
    lengths = [len(entries) for entries in (weights or a, a, cores, b, scalings, biases or a)]
    if len(set(lengths)) != 1 or not lengths[0]:
        named = zip(("weights", "lora_A", "lora_R", "lora_B", "scalings", "biases"), lengths, strict=True)
        found = ", ".join(f"{name} {length}" for name, length in named)
        raise ValueError(f"expected one of each argument for every member, got {found}")
    for one in (*weights, *biases):
        if not isinstance(one, Tensor):
            raise TypeError(
                f"expected dense weights and biases in a group, got {type(one).__name__}: call lora_sb_linear"
            )
    ranks = [factor.shape[0] for factor in a]
    if len(set(ranks)) != 1:
        raise ValueError(f"expected one rank for all members, got {ranks}")
    for j in range(len(a)):
        # the range of the index is checked where it is used, so that compiled calls are checked too
        core = cores[j] if index is None else _of_stack(x, cores[j], index)
        check_linear(x, weights[j] if weights else None, a[j], core, b[j], biases[j] if biases else None)


def _of_stack(x: Tensor, cores: Tensor, index: Tensor) -> Tensor:
    if cores.dim() != 3:
        raise ValueError(f"expected lora_R [K, r, r] with an index of rows, got {_shape(cores)}")
    if index.dim() != 1 or index.dtype != torch.int64 or not index.is_cpu:
        raise TypeError(f"expected index [n] in int64 on the CPU, got {_shape(index)}, {index.dtype} on {index.device}")
    if x.dim() < 2 or len(index) != x.shape[0]:
        raise ValueError(f"expected an index for each of the rows of x [n, ..., in], got {len(index)} for {_shape(x)}")
    return cores[0] if len(cores) else cores.new_empty(cores.shape[1:])


def check_linear(x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raise an error if shapes, ranks, dtypes or devices do not match."""
    if a.dim() != 2 or b.dim() != 2 or core.dim() != 2 or a.shape[0] > MAX_RANK:
        raise ValueError(
            f"expected lora_A [r, in], lora_R [r, r] and lora_B [out, r] with r <= {MAX_RANK}, "
            f"got {_shape(a)}, {_shape(core)} and {_shape(b)}"
        )
    (r, features_in), (features_out, columns) = a.shape, b.shape
    if columns != r or core.shape != (r, r):
        raise ValueError(f"ranks differ: lora_A {_shape(a)}, lora_R {_shape(core)}, lora_B {_shape(b)}")
    if x.dim() < 1 or x.shape[-1] != features_in:
        raise ValueError(f"expected x [..., {features_in}] (in_features of lora_A), got {_shape(x)}")
    if weight is not None and weight.shape != (features_out, features_in):
        raise ValueError(f"expected weight [{features_out}, {features_in}], got {_shape(weight)}")
    if bias is not None and bias.shape != (features_out,):
        raise ValueError(f"expected bias [{features_out}], got {_shape(bias)}")
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS:
        raise TypeError(f"expected x in fp64, fp32, bf16 or fp16, got {dtype}")
    if core.dtype not in FLOATS:
        raise TypeError(f"expected lora_R in fp32, got {core.dtype}")
    for name, tensor in (("weight", weight), ("lora_A", a), ("lora_B", b), ("bias", bias), ("lora_R", core)):
        if tensor is None:
            continue
        if tensor.dtype != dtype and tensor is not core:
            raise TypeError(f"expected {name} in x's dtype {dtype}, got {tensor.dtype}: cast one of the two")
        if tensor.device != device:
            raise ValueError(f"expected {name} on x's device {device}, got {tensor.device}: move one of the two")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
