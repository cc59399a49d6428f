"""The Triton backend: the fused kernels of `lorasb.kernels` on CUDA, or on the CPU under Triton's interpreter.
Nothing here imports triton before the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import warnings
from collections.abc import Hashable, Iterator, Sequence
from functools import cache, lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compat.triton import VERIFIED
from ..kernels import plan as plan_tables
from ..kernels.operands import NO_DROPOUT, Mask, Members, unit_rows
from ..kernels.plan import LaunchPlan, Shape
from ..ops import calls, registry
from ..ops.adapted_linear import register_backend
from ..ops.calls import DENSE, Operands
from . import autotune, cpp, eager
from .autotune import is_capturing
from .eager import check_index, chosen_cores, kernel_dropout, kernel_masks, shaped

if TYPE_CHECKING:
    from ..kernels.linear_quantized import Quantized
    from ..kernels.row_cores import RowProducts

INTERPRET = "TRITON_INTERPRET"
HAVE_KERNELS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # uint8: a weight in 4 bits
SMALLEST_CAPABILITY = (8, 0)  # bf16 and TF32 in tensor cores; the tables start at sm_80
_broken: dict[Hashable, str] = {}  # kernel and shapes -> why `auto` no longer uses it for them
EVERY = "every kernel"  # key in `_broken` for errors that affect all kernels
# Triton's errors if it cannot build its launchers, and the fix
BUILDS = re.compile(r"C compiler|libcuda|\bPython\.h\b")
HELP = f"Triton needs a C compiler and Python's headers (apt-get install gcc python3-dev); tested with {VERIFIED}"


class CaptureError(RuntimeError):
    """Error of a call that cannot be captured in a CUDA graph."""


def forward(x: Tensor, operands: Operands) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j [M, r]: one pass over x and one extended GEMM for any number of members."""
    if operands.row_index is not None:
        return _forward_by_row(x, operands, operands.row_index)
    if operands.is_quantized:
        if not operands.a[0].shape[0]:  # without an adapter there is nothing to fuse
            return eager.eager_forward(x, operands)
        if _is_int8(operands):
            return forward(x, _dense_operands(operands, x.dtype))
        return _forward_quantized(x, operands)
    members, mask = members_of(operands), mask_of(operands)
    first, signature = (_forward_plan, _check_forward), calls.metadata(x, *members[:5])
    found = _kernels().prepared_linear.forward(x, members, mask, first, signature)
    if found is None:
        found = _kernels().linear.forward(rows_of(x), members, _forward_plan(x, members, mask), mask)
    ys, us = found
    return [y if y.dim() == x.dim() else shaped(y, x) for y in ys] + us


def backward(dys: list[Tensor], us: list[Tensor], operands: Operands, need_dx: bool, need_dcores: bool) -> list[Tensor]:
    """dx = Σ_j dy_j W_j + (s_j·t_j R_j) A_j, written once, then the dR_j; unneeded results are empty."""
    if operands.row_index is not None:
        return _backward_by_row(dys, us, operands, operands.row_index, need_dx, need_dcores)
    if operands.is_quantized:
        if not operands.a[0].shape[0]:
            return eager.eager_backward(dys, us, operands, need_dx, need_dcores)
        if _is_int8(operands):
            return backward(dys, us, _dense_operands(operands, dys[0].dtype), need_dx, need_dcores)
        return _backward_quantized(dys[0], us[0], operands, need_dx, need_dcores)
    members, mask = members_of(operands), mask_of(operands)
    given, signature = (dys, members, us, mask), calls.metadata(dys, us, *members[:4])
    need, first = (need_dx, need_dcores), (_backward_plan, _check_backward)
    found = _kernels().prepared_linear.backward(*given, need, first, signature)
    if found is None:
        rows, plan = [rows_of(dy) for dy in dys], _backward_plan(*given)
        found = _kernels().linear.backward(rows, members, us, plan, need_dx, need_dcores, mask)
    dx, dcores = found
    return _gradients(dys[0], dx, dcores, operands.cores)


def _gradients(like: Tensor, dx: Tensor | None, dcores: Sequence[Tensor], cores: Sequence[Tensor]) -> list[Tensor]:
    if dx is None:
        dx = like.new_empty((0,))
    elif dx.dim() != like.dim():
        dx = shaped(dx, like)
    return [dx, *(dcores or [core.new_empty((0,)) for core in cores])]


def _forward_quantized(x: Tensor, operands: Operands) -> list[Tensor]:
    rows, members, mask = rows_of(x), members_of(operands), mask_of(operands)
    run = partial(_kernels().linear_quantized.forward, rows, _weight(operands), members, mask=mask)

    def check(found: tuple[Tensor, Tensor]) -> None:
        autotune.check_forward(rows, _dense_members(operands, members, rows), mask, ([found[0]], found[1]))

    y, u = run(_first_plan("forward", rows, members, mask, run, check, "4bit"))
    return [shaped(y, x), u]


def _backward_quantized(dy: Tensor, u: Tensor, operands: Operands, need_dx: bool, need_dcores: bool) -> list[Tensor]:
    rows, members, mask = rows_of(dy), members_of(operands), mask_of(operands)
    run = partial(_kernels().linear_quantized.backward, rows, _weight(operands), members, u, mask=mask)

    def check(found: autotune.Gradients) -> None:
        autotune.check_backward([rows], _dense_members(operands, members, rows), [u], mask, found)

    first = partial(run, need=(True, need_dcores))
    plan = _first_backward(rows, members, mask, first, check, need_dcores, "4bit")
    dx, dcores = run(plan, need=(need_dx, need_dcores))
    return _gradients(dy, dx, dcores, operands.cores)


def _dense_members(operands: Operands, members: Members, rows: Tensor) -> Members:
    """Return the members with W dequantized by eager torch, to check a first call."""
    return members._replace(weights=_dense_operands(operands, rows.dtype).base)


def _forward_by_row(x: Tensor, operands: Operands, index: Tensor) -> list[Tensor]:
    """Compute with one R per row; over a quantized weight, add the adapter to the kernels' result for R = 0."""
    check_index(index, min(map(len, operands.cores)))
    base, of_rows, rows = _without_cores(operands), _row_products(operands, index), rows_of(x)
    members = members_of(base)
    if operands.is_quantized:
        y, u = forward(x, base)
        v = of_rows[0].times(u, True, u.new_empty((len(u), members.width)))
        y.add_(shaped(v[:, : u.shape[1]] @ operands.b[0].t(), y))
        ys, us = [y.view(-1, y.shape[-1])], [u]
    else:
        ys, us = _kernels().linear.forward(rows, members, plan_of("forward", rows, members), rows=of_rows)

    def _check() -> None:
        autotune.check_forward(rows, _members_of_first(operands, index, rows), NO_DROPOUT, (ys, us))

    autotune.first_check(_kind("forward", rows, members, operands), rows, _check)
    return [*(shaped(y, x) for y in ys), *us]


def _backward_by_row(
    dys: list[Tensor], us: list[Tensor], operands: Operands, index: Tensor, need_dx: bool, need_dcores: bool
) -> list[Tensor]:
    base, of_rows = _without_cores(operands), _row_products(operands, index)
    rows, members = [rows_of(dy) for dy in dys], members_of(base)
    if operands.is_quantized:
        t, dx = rows[0] @ operands.b[0], None
        if need_dx:
            dx = backward(rows, [us[0][:0]], base, True, False)[0]
            w = of_rows[0].times(t, False, t.new_empty((len(t), members.width)))
            dx.addmm_(w[:, : t.shape[1]], operands.a[0])
        dcores = [of_rows[0].gradients(t, us[0])] if need_dcores else []
    else:
        plan = plan_of("backward", rows[0], members)
        dx, dcores = _kernels().linear.backward(rows, members, us, plan, need_dx, need_dcores, rows=of_rows)

    def _check() -> None:
        first, k = _members_of_first(operands, index, rows[0]), int(index.max())
        autotune.check_backward(rows, first, us, NO_DROPOUT, (dx, []))
        if k >= 0:  # dR of one adapter, over its own rows
            own = (index == k).repeat_interleave(len(rows[0]) // len(index)).to(rows[0].device).unsqueeze(1)
            found = None, [dcore[k] for dcore in dcores]
            autotune.check_backward([dy * own for dy in rows], first, us, NO_DROPOUT, found)

    autotune.first_check(_kind("backward", rows[0], members, operands), rows[0], _check)
    return _gradients(dys[0], dx, dcores, operands.cores)


def _kind(op: str, rows: Tensor, members: Members, operands: Operands) -> Hashable:
    """Return the kind of a call with one R per row; its plans are not timed."""
    return _shape(op, rows, members, "4bit" if operands.is_quantized else "none", False)


def _without_cores(operands: Operands) -> Operands:
    """Replace each stack by one R = 0 in fp32, for kernels whose own product with R is not used."""
    cores = [stack.new_zeros(stack.shape[1:], dtype=torch.float32) for stack in operands.cores]
    return operands._replace(cores=cores, scalings=[1.0] * len(cores), row_index=None)


def _members_of_first(operands: Operands, index: Tensor, rows: Tensor) -> Members:
    """Return the members with one R for each of the first tokens of `rows`, zero for tokens that have none."""
    places = index.repeat_interleave(len(rows) // len(index))[: autotune.TILE_ROWS].to(rows.device)
    cores = [chosen_cores(stack, places) for stack in operands.cores]
    members = members_of(operands)._replace(cores=cores)
    return _dense_members(operands, members, rows) if operands.is_quantized else members


def _row_products(operands: Operands, index: Tensor) -> list[RowProducts]:
    pairs = zip(operands.cores, operands.scalings, strict=True)
    return [_kernels().row_cores.RowProducts(stack, index, float(scaling)) for stack, scaling in pairs]


def dequantize(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return W [rows, columns]; eager torch dequantizes 8 bits, as there is no kernel."""
    if len(quant) == 2:
        return eager.dequantize(quant, layout, rows, columns, dtype)
    check_call(quant[1].new_empty(0, dtype=torch.float32))  # checks the device; any supported dtype will do
    kernels = _kernels().linear_quantized
    found: Tensor = kernels.dequantized(kernels.Quantized(quant, tuple(layout), rows, columns), dtype)

    def _check() -> None:
        autotune.check_weight(found, eager.dequantize(quant, layout, rows, columns, dtype))

    autotune.first_check(("dequantize", dtype, rows, columns), found, _check)
    return found


def _is_int8(operands: Operands) -> bool:
    return len(operands.base) == 2


def _dense_operands(operands: Operands, dtype: torch.dtype) -> Operands:
    shape = operands.b[0].shape[0], operands.a[0].shape[1]
    weight = eager.dequantize(list(operands.base), list(operands.layout), *shape, dtype)
    return operands._replace(base=[weight], layout=DENSE)


def _weight(operands: Operands) -> Quantized:
    shape = operands.b[0].shape[0], operands.a[0].shape[1]
    return _kernels().linear_quantized.Quantized(operands.base, tuple(operands.layout), *shape)


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] fp32 (+)= dyᵀ x."""
    dy, arch, kernel = dy.to(x.dtype), _check_gradient(x, total), _kernels().weight_gradient.gradient_add

    def _check() -> None:
        trial = torch.empty_like(total)  # `total` must change only once
        kernel(dy, x, trial, True, arch)
        autotune.check_gradient(dy, x, trial)

    autotune.first_check(("gradient_add", x.dtype, total.shape, plan_tables.bucket(len(x))), x, _check)
    kernel(dy, x, total, fresh, arch)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bits G > 0 and G != 0 of G = total + dyᵀ x, as words; and [Σ G², zeros, NaN or Inf entries]."""
    dy, arch, kernel = dy.to(x.dtype), _check_gradient(x, total), _kernels().weight_gradient.gradient_signs

    def _check() -> None:
        autotune.check_signs(dy, x, *kernel(dy, x, None, True, arch)[:2])

    shape = dy.shape[1], x.shape[1]
    autotune.first_check(("gradient_signs", x.dtype, shape, plan_tables.bucket(len(x))), x, _check)
    found: tuple[Tensor, Tensor, Tensor] = kernel(dy, x, total, fresh, arch)
    return found


def _check_gradient(x: Tensor, total: Tensor | None) -> str:
    """Return the architecture for a gradient call; raise if there is no kernel for it."""
    arch, _ = check_call(x)
    if total is not None and total.dtype != torch.float32:
        raise TypeError(f"backend 'triton' expected an fp32 sum, got {total.dtype}: backend('eager') takes it")
    return plan_tables.family(arch)


def mask_of(operands: Operands) -> Mask:
    """Return dropout's probability, and its seeds as numbers."""
    if operands.seeds is None or operands.dropout <= 0.0:
        return NO_DROPOUT
    if is_capturing():  # replays would repeat the mask
        raise CaptureError("a CUDA graph would replay one mask: set lora_dropout=0 or call model.eval() before capture")
    return Mask(kernel_dropout(operands.dropout), tuple(operands.seeds.tolist()))


def _forward_plan(x: Tensor, members: Members, mask: Mask) -> LaunchPlan:
    rows = rows_of(x)
    run = partial(_kernels().linear.forward, rows, members, mask=mask)
    return _first_plan("forward", rows, members, mask, run, partial(autotune.check_forward, rows, members, mask))


def _backward_plan(dys: Sequence[Tensor], members: Members, us: list[Tensor], mask: Mask) -> LaunchPlan:
    rows = [rows_of(dy) for dy in dys]
    has_u = all(len(u) == len(row) for u, row in zip(us, rows, strict=True))  # u is not saved for a frozen R
    run = partial(_kernels().linear.backward, rows, members, us, need_dx=True, need_dcore=has_u, mask=mask)
    check = partial(autotune.check_backward, rows, members, us, mask)
    return _first_backward(rows[0], members, mask, run, check, has_u)


def _check_forward(x: Tensor, members: Members, mask: Mask, found: tuple[list[Tensor], list[Tensor]]) -> None:
    """Check the first prepared launches of a kind: the check of its plan ran Triton's own launches."""
    if x.is_cuda and not is_capturing():
        autotune.check_forward(rows_of(x), members, mask, ([rows_of(y) for y in found[0]], found[1]))


def _check_backward(
    dys: Sequence[Tensor], members: Members, us: list[Tensor], mask: Mask, found: tuple[Tensor | None, list[Tensor]]
) -> None:
    """Check the first prepared launches of a kind of backward."""
    if dys[0].is_cuda and not is_capturing():
        dx = None if found[0] is None else rows_of(found[0])
        autotune.check_backward([rows_of(dy) for dy in dys], members, us, mask, (dx, found[1]))


def _first_backward(
    rows: Tensor,
    members: Members,
    mask: Mask,
    run: autotune.Run,
    check: autotune.Check,
    has_dcore: bool,
    quant: str = "none",
) -> LaunchPlan:
    """Return the plan of a backward; without dR, the first call of its kind is checked but not timed."""
    if has_dcore:
        return _first_plan("backward", rows, members, mask, run, check, quant)
    given = "backward", rows, members, quant, mask.dropout > 0.0
    plan = plan_of(*given)
    autotune.first_check((_shape(*given), "dx alone"), rows, lambda: check(run(plan)))
    return plan


def _first_plan(
    op: str, rows: Tensor, members: Members, mask: Mask, run: autotune.Run, check: autotune.Check, quant: str = "none"
) -> LaunchPlan:
    """Return the plan of a call, checked and timed on the first call of its kind on a GPU."""
    given = op, rows, members, quant, mask.dropout > 0.0
    if not rows.is_cuda or not rows.numel():
        return plan_of(*given)
    arch, sms = check_call(rows)
    clock, has_bias = partial(autotune.CudaClock, rows.device), any(bias is not None for bias in members.biases)
    return autotune.first_plan(_shape(*given), arch, sms, run, check, clock, has_bias)


def or_eager(kernel: registry.Function, plain: registry.Function) -> registry.Function:
    """Wrap a kernel: eager torch computes if the GPU or dtype has no kernels, or after a failure."""

    def call(*arguments: Any) -> Any:
        x = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        if x.dtype not in HAVE_KERNELS or not _is_capable(x.device):
            return plain(*arguments)
        if not _broken or not (EVERY in _broken or call_key(kernel, arguments) in _broken):
            try:
                return kernel(*arguments)
            except (torch.OutOfMemoryError, CaptureError, IndexError):  # IndexError: a wrong index of rows
                raise
            except Exception as error:
                _raise_if_nothing_else_runs(error)
                _give_up(EVERY if _stops_all(error) else call_key(kernel, arguments), error)
        with kernel_masks():
            return plain(*arguments)

    return call


def _raise_if_nothing_else_runs(error: Exception) -> None:
    """Raise after a device fault or during CUDA graph capture: eager torch would fail as well."""
    if autotune.FAULTS.search(str(error)):
        raise RuntimeError(
            f"the GPU reported a fault of an earlier kernel, lorasb's or another's ({error}): rerun with "
            "CUDA_LAUNCH_BLOCKING=1 to identify it, and with LORASB_BACKEND=eager to exclude lorasb's kernels, or "
            "LORASB_TUNE=off to exclude those that run only to be timed"
        ) from error
    if is_capturing():
        raise CaptureError(
            f"CUDA graph capture met a new kernel ({error}): call the model once with the same shapes before capturing"
        ) from error


def missing() -> str | None:
    """Return why the kernels cannot run here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreting() or torch.cuda.is_available():
        return None
    return f"there is no CUDA GPU ({INTERPRET}=1 runs the kernels on the CPU, slowly, to test them)"


def interpreting() -> bool:
    return os.environ.get(INTERPRET) == "1"


def register() -> None:
    """Register for CUDA, and on the CPU for an explicit backend under Triton's interpreter."""
    plan_tables.read_user_tables_from(autotune.tables, autotune.machine)
    registry.missing["triton"] = missing
    others: dict[str, registry.Function] = {one.__name__: one for one in (dequantize, gradient_add, gradient_signs)}
    register_backend(("triton",), ("CUDA", "CPU"), forward, backward, others)
    if importlib.util.find_spec("triton") is not None:
        tried = or_eager(forward, eager.eager_forward), or_eager(backward, eager.eager_backward)
        others = {op: or_eager(kernel, eager.PLAIN_OPS[op]) for op, kernel in others.items()}
        register_backend(("auto",), ("CUDA",), *tried, others)


def rows_of(x: Tensor) -> Tensor:
    """Return x as [M, n] with a contiguous last dimension and any lazy negation applied."""
    return unit_rows(x.resolve_neg().reshape(-1, x.shape[-1]))


def members_of(operands: Operands) -> Members:
    """Return the layers as the kernels take them; scales include dropout's factor 1 / (1 - p), to multiply once."""
    base, layout, a, cores, b, biases, scales, _, dropout, _ = operands
    if dropout > 0.0:
        scales = [scale / (1.0 - kernel_dropout(dropout)) for scale in scales]
    weights = base if base and not layout[1] else [None] * len(a)
    return Members(weights, a, cores, b, biases if biases else [None] * len(a), scales)


@cache
def _kernels() -> ModuleType:
    """Import the kernels, and thus triton, at the first call. Cached: an import statement takes a microsecond."""
    import lorasb.kernels.linear_quantized
    import lorasb.kernels.prepared_launch
    import lorasb.kernels.prepared_linear
    import lorasb.kernels.weight_gradient

    if cpp.extension is not None:
        lorasb.kernels.prepared_launch.allocate = cpp.extension.allocate
        lorasb.kernels.prepared_launch.addresses = cpp.extension.addresses
    return lorasb.kernels


def plan_of(op: str, rows: Tensor, members: Members, quant: str = "none", dropout: bool = False) -> LaunchPlan:
    """Return the tables' choice for this call."""
    arch, sms = check_call(rows)
    return plan_tables.choice(_shape(op, rows, members, quant, dropout), arch, sms)


def _shape(op: str, rows: Tensor, members: Members, quant: str, dropout: bool) -> Shape:
    tokens, dtype = plan_tables.bucket(rows.shape[0]), plan_tables.DTYPES[rows.dtype]
    (r, n), m = members.a[0].shape, sum(b.shape[0] for b in members.b)
    return Shape(op, dtype, tokens, n, m, r, len(members.b), quant, dropout)


def check_call(x: Tensor) -> tuple[str, int]:
    """Return architecture and number of multiprocessors of x's device; raise if the kernels cannot run on x."""
    if x.dtype not in plan_tables.DTYPES:
        raise TypeError(f"backend 'triton' expected x in fp32, bf16 or fp16, got {x.dtype}: backend('eager') takes it")
    arch, sms = architecture(x.device)
    if arch == plan_tables.INTERPRETER and not interpreting():
        raise ValueError(f"backend 'triton' expected a CUDA tensor, got one on {x.device}: backend('auto') takes it")
    if arch == plan_tables.INTERPRETER and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies the raw bits of bf16: use fp32 or fp16 on the CPU")
    return arch, sms


@lru_cache
def architecture(device: torch.device) -> tuple[str, int]:
    """Return the name of a device's architecture, as in the tables, and its number of multiprocessors."""
    if device.type != "cuda":
        return plan_tables.INTERPRETER, 1
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


@cache
def _is_capable(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY


def call_key(kernel: registry.Function, arguments: Sequence[object]) -> tuple[Hashable, ...]:
    """Return the key for a failure: kernel, dtype, and shapes, with the number of rows rounded as for plans."""
    tensors = list(_tensors(arguments))
    first = tensors[0]
    rows = math.prod(first.shape[:-1])
    shapes = [tuple(t.shape[1:]) if t.dim() == 2 and t.shape[0] == rows else tuple(t.shape) for t in tensors[1:]]
    return kernel.__module__, kernel.__name__, first.dtype, first.shape[-1], plan_tables.bucket(rows), *shapes


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _stops_all(error: Exception) -> bool:
    """True if every kernel would fail like this one: Triton lacks a name, or cannot build its launcher."""
    return isinstance(error, ImportError | subprocess.CalledProcessError) or bool(BUILDS.search(str(error)))


def _give_up(key: Any, error: Exception) -> None:
    """Warn, and from now on avoid this kernel for such calls, as others may well run; or all kernels."""
    if not isinstance(error, ImportError):  # ImportError: nothing to forget, and this would raise it again
        _kernels().operands.forget_counters()
        _kernels().prepared_linear.forget()
    _broken[key] = f"{type(error).__name__}: {error}"
    calls = f". {HELP}" if key == EVERY else f", for calls like this one ({key[1]}, {key[3]} features, {key[2]})"
    warnings.warn(
        f"lorasb's fused kernels do not run here ({_broken[key]}): eager torch computes instead, from now on{calls}. "
        "lorasb.backend('triton') raises the error",
        RuntimeWarning,
        stacklevel=2,
    )
