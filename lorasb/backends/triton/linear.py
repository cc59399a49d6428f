"""The fused kernels: which plan a call takes, and what happens if a kernel does not compile or launch.

An explicit `backend("triton")` raises. `auto` computes the call in eager torch instead, warns once, and stays with
eager. Nothing here imports triton before the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...ops import signatures
from ...ops.registry import register_backend
from .. import cpp
from ..eager import linear as eager
from .masks import CaptureError, mask_of

INTERPRET = "TRITON_INTERPRET"
SMALLEST_CAPABILITY = (8, 0)  # bf16 and TF32 in tensor cores; the tables start at sm_80
_broken: dict[tuple[Any, ...], str] = {}  # kernel and shapes -> why `auto` no longer takes it for them


def forward(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s·u Rᵀ Bᵀ + bias [..., out] and u = x Aᵀ [M, r]."""
    members = members_of(weight, a, core, b, scaling, dropout)
    (y,), (u,) = _forward(x, members, [bias], mask_of(dropout, seed))
    return y, u


def backward(
    dy: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    u: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dcore: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty."""
    members = members_of(weight, a, core, b, scaling, dropout)
    dx, (dcore,) = _backward([dy], members, [u], need_dx, need_dcore, mask_of(dropout, seed))
    return dx, dcore


def group_forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    scalings: list[float],
    dropout: float,
    seeds: Tensor | None,
) -> list[Tensor]:
    """y_i [..., m_i] of every member, then u_i [M, r]: one pass over x and one grouped extended GEMM."""
    members = _group_of(weights, a, cores, b, scalings, dropout)
    ys, us = _forward(x, members, list(biases) or [None] * len(a), mask_of(dropout, seeds))
    return [*ys, *us]


def group_backward(
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    dropout: float,
    seeds: Tensor | None,
    need_dx: bool,
    need_dcore: bool,
) -> list[Tensor]:
    """dx = Σ_i dy_i W_i + (s_i·t_i R_i) A_i, written once, and dR_i."""
    members = _group_of(weights, a, cores, b, scalings, dropout)
    dx, dcores = _backward(dys, members, us, need_dx, need_dcore, mask_of(dropout, seeds))
    return [dx, *dcores]


def _forward(x: Tensor, members: Any, biases: list[Any], mask: Any) -> tuple[list[Tensor], list[Tensor]]:
    """y_i [..., m_i] and u_i [M, r], by prepared launches where they can be repeated."""
    plan = partial(_plan, "forward", x, members)
    signature = signatures.metadata(x, biases, *members[:4])
    found = _kernels().forward(x, members, biases, plan, mask, signature)
    if found is None:
        from lorasb.kernels import linear as kernels

        given = [None if bias is None else bias.resolve_neg() for bias in biases]
        found = kernels.forward(rows_of(x), resolved(members), given, plan(), mask)
    ys, us = found
    return [y if y.dim() == x.dim() else eager.shaped(y, x) for y in ys], us


def _backward(
    dys: list[Tensor], members: Any, us: list[Tensor], need_dx: bool, need_dcore: bool, mask: Any
) -> tuple[Tensor, list[Tensor]]:
    """dx [..., n] and dR_i, empty where they are not needed."""
    like = dys[0]
    plan = partial(_plan, "backward", like, members)
    signature = signatures.metadata(dys, us, *members[:4])
    found = _kernels().backward(dys, members, us, plan, need_dx, need_dcore, mask, signature)
    if found is None:
        from lorasb.kernels import linear as kernels

        rows = [rows_of(dy) for dy in dys]
        found = kernels.backward(rows, resolved(members), us, plan(), need_dx, need_dcore, mask)
    dx, dcores = found
    if dx is None:
        dx = like.new_empty((0,))
    elif dx.dim() != like.dim():
        dx = eager.shaped(dx, like)
    return dx, dcores or [core.new_empty((0,)) for core in members.cores]


def _plan(op: str, x: Tensor, members: Any) -> Any:
    return plan_of(op, rows_of(x), members.b, members.a[0])


def or_eager(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, or eager torch where this GPU or dtype has no kernels or one of them has failed."""

    def call(*arguments: Any) -> Any:
        if not _suits(arguments[0][0] if isinstance(arguments[0], list) else arguments[0]):
            return plain(*arguments)
        if not _broken or call_key(kernel, arguments) not in _broken:
            try:
                return kernel(*arguments)
            except (torch.OutOfMemoryError, CaptureError):
                raise
            except Exception as error:
                _give_up(call_key(kernel, arguments), error)
        with eager.kernel_masks():
            return plain(*arguments)

    return call


def missing() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreting() or torch.cuda.is_available():
        return None
    return f"there is no CUDA GPU ({INTERPRET}=1 runs the kernels on the CPU, slowly, to test them)"


def interpreting() -> bool:
    """True if Triton interprets kernels on the CPU."""
    return os.environ.get(INTERPRET) == "1"


def register() -> None:
    """Register for CUDA; on the CPU, for an explicit backend under Triton's interpreter."""
    register_pairs(
        {
            "linear": (forward, eager.forward),
            "linear_backward": (backward, eager.backward),
            "linear_group": (group_forward, eager.group_forward),
            "linear_group_backward": (group_backward, eager.group_backward),
        }
    )


def register_pairs(pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Register ops by name, each a kernel and the eager function behind it."""
    register_backend(
        "triton",
        [(op, kernel) for op, (kernel, _) in pairs.items()],
        ("CUDA", "CPU"),
        auto=[(op, or_eager(kernel, plain)) for op, (kernel, plain) in pairs.items()],
        auto_keys=("CUDA",) if importlib.util.find_spec("triton") else (),
        missing=missing,
    )


def rows_of(x: Tensor) -> Tensor:
    """x as [M, n] with a contiguous last dimension, and with the signs in memory that it has."""
    x = x.resolve_neg()
    # reshape(-1, 0) is ambiguous
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((math.prod(x.shape[:-1]), 0))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def resolved(members: Any) -> Any:
    """With the signs in memory: torch negates lazily, when it reads (the imaginary part of a conjugate)."""
    return members.map(lambda tensor: None if tensor is None else tensor.resolve_neg())


def members_of(weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Any:
    """One layer as a group; its scale holds dropout's factor 1 / (1 - p), so that the kernels multiply once."""
    return _kernels().Members([weight], [a], [core], [b], _scales([scaling], dropout))


def _group_of(
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    dropout: float,
) -> Any:
    return _kernels().Members(weights, a, cores, b, _scales(scalings, dropout))


def _scales(scalings: Sequence[float], dropout: float) -> list[float]:
    kept = 1.0 - eager.kernel_dropout(dropout) if dropout > 0.0 else 1.0
    return [float(scaling) / kept for scaling in scalings]


@cache
def _kernels() -> Any:
    """Imported at the first call, as they import triton; kept, as an import statement costs a microsecond a time."""
    from lorasb.kernels import allocation, prepared_linear

    if cpp.extension is not None:
        allocation.use(cpp.extension.allocate)
    return prepared_linear


def plan_of(op: str, rows: Tensor, b: list[Tensor], a: Tensor, quant: str = "none") -> Any:
    """The tables' choice for this call."""
    from lorasb.kernels import plan

    arch, sms = check_call(rows)
    shape = plan.Shape(
        op=op,
        dtype=plan.DTYPES[rows.dtype],
        M=plan.bucket(rows.shape[0]),
        n=a.shape[1],
        m=sum(factor.shape[0] for factor in b),
        r=a.shape[0],
        members=len(b),
        quant=quant,
    )
    return plan.choice(shape, arch, sms)


def check_call(x: Tensor) -> tuple[str, int]:
    """Architecture and number of multiprocessors of the device that a call runs on.

    Raises:
        TypeError: a dtype that the kernels do not have.
        ValueError: a CPU tensor, and Triton is not interpreting.
    """
    from lorasb.kernels import plan

    if x.dtype not in plan.DTYPES:
        raise TypeError(f"backend 'triton' expected x in fp32, bf16 or fp16, got {x.dtype}: backend('eager') takes it")
    arch, sms = _device(x.device)
    if arch == plan.INTERPRETER and not interpreting():
        raise ValueError(f"backend 'triton' expected a CUDA tensor, got one on {x.device}: backend('auto') takes it")
    if arch == plan.INTERPRETER and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies the raw bits of bf16: use fp32 or fp16 on the CPU")
    return arch, sms


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors."""
    from lorasb.kernels import plan

    if device.type != "cuda":
        return plan.INTERPRETER, 1
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _suits(x: Tensor) -> bool:
    """True if `auto` tries the kernels: CUDA since sm_80, and a dtype that they have (uint8: a weight in 4 bits)."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8) and _is_capable(x.device)


@cache
def _is_capable(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY


def call_key(kernel: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Key under which a failure is remembered: the kernel, dtypes, and shapes with the rows as plans see them."""
    from lorasb.kernels import plan

    tensors = [t for value in arguments for t in (value if isinstance(value, list) else [value])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    first = tensors[0]
    rows = math.prod(first.shape[:-1])
    shapes = [tuple(t.shape[1:]) if t.dim() == 2 and t.shape[0] == rows else tuple(t.shape) for t in tensors[1:]]
    return kernel.__module__, kernel.__name__, first.dtype, first.shape[-1], plan.bucket(rows), *shapes


def _give_up(key: tuple[Any, ...], error: Exception) -> None:
    """Warn, and leave this kernel alone for such calls from now on: others may well run."""
    from lorasb.kernels import prepared_linear, workspace

    workspace.forget()
    prepared_linear.forget()
    _broken[key] = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"lorasb's fused kernels do not run here ({_broken[key]}): eager torch computes instead, from now on, "
        f"for calls like this one ({key[1]}, {key[3]} features, {key[2]}). lorasb.backend('triton') raises the error "
        "itself",
        RuntimeWarning,
        stacklevel=2,
    )
