"""The C++ backend: loads the compiled extension, if this build has one, for CPU tensors; else eager torch computes.

The extension registers its kernels for quantized weights with the dispatcher itself, under the ops of `cpp` and of
`auto`; here they are recorded in `ops.registry`, so that small calls reach them directly. Dense layers use the BLAS, as
eager composes it, with three exceptions. In 16 bits on processors without such products, the extension widens W to fp32
panel by panel: torch takes three to five times as long as in fp32 forward and about a hundred times backward. On AVX2,
the extension also computes large weights in fp32. In bf16 on processors that multiply it, few tokens, as decoding has
them, are one call forward that reads W in place: less time than the BLAS takes for W alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat import torch as private
from ..ops import signatures
from ..ops.registry import backend_op, register_backend, register_loaded
from .eager import linear as eager
from .eager import linear_rows as eager_rows

DISABLE = "LORASB_NO_CSRC"  # environment variable: 1 runs without the extension
CAP = "LORASB_MAX_CPU_ISA"  # environment variable, read by the extension: the best instruction set to use
CAPS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE_WEIGHT = 1 << 21  # elements of W; from here on the extension is faster in fp32 (measured on two Zen 3 cores)
# Ops whose kernels the extension registers itself.
OPS = ("linear_quantized", "linear_quantized_backward", "dequantize", "gradient_add", "gradient_signs")
_reason: str | None = "not loaded yet"
extension: Any = None  # the module, once loaded; besides its kernels it has functions that Python calls directly


def library() -> Path | None:
    """Path of the extension built for this Python; None if there is none."""
    folder = Path(__file__).parents[1]
    candidates = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def missing() -> str | None:
    """The reason why the C++ kernels cannot run; None if they can."""
    return _reason


def instruction_set() -> str:
    """The instruction set whose kernels run: "AMX", "AVX-512 with bf16", "AVX-512", "AVX2" or "portable"."""
    name: str = torch.ops.lorasb_csrc.instruction_set()
    return name


def instruction_sets() -> list[str]:
    """The instruction sets that this processor has, best first."""
    names: list[str] = torch.ops.lorasb_csrc.instruction_sets()
    return names


def use_instruction_set(name: str) -> None:
    """Use the kernels of one instruction set; "" for the best available.

    Raises:
        ValueError: this processor does not have it.
    """
    torch.ops.lorasb_csrc.use_instruction_set(name)
    _forget()


def serves(dtype: torch.dtype, *weights: Tensor | None) -> bool:
    """True if the extension computes dense layers of this dtype and these weights on a CPU.

    It does so in 16-bit dtypes that the processor does not multiply, and for large fp32 weights on AVX2, where the BLAS
    was slower with two threads.
    """
    if not _multiplies(dtype) or dtype != torch.float32:
        return _multiplies(dtype)
    return any(weight is not None and weight.numel() >= LARGE_WEIGHT for weight in weights)


def serves_few(x: Tensor, *weights: Tensor | None) -> bool:
    """True if the extension computes forward for as few tokens as x [..., in] has, in bf16 where that is multiplied.

    It reads contiguous W's [out, in] as they lie, in one call; the BLAS packs each again every time, in four.
    """
    if x.dtype != torch.bfloat16 or not 0 < x.numel() <= most_tokens() * x.shape[-1]:
        return False
    return all(weight is not None and weight.is_contiguous() for weight in weights)


@lru_cache
def most_tokens() -> int:
    """Tokens up to which that is faster on the instruction set in use; 0 where there is no such product."""
    return 0 if _reason is not None else int(torch.ops.lorasb_csrc.max_unpacked_tokens())


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    """True if the extension computes products of a dtype on the instruction set in use. Cached, as every call asks."""
    return _reason is None and dtype in DTYPES and bool(torch.ops.lorasb_csrc.serves(dtype))


def _forget() -> None:
    _multiplies.cache_clear()
    most_tokens.cache_clear()


def _extension_or_eager(name: str, eager_kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that calls the extension's kernel `name` if it serves the call, else eager's, with equal arguments.

    The first arguments are x (or dy) and W; lists of them for a group.
    """

    def call(x: Tensor | list[Tensor], weight: Tensor | list[Tensor] | None, *others: Any) -> Any:
        dtype = (x[0] if isinstance(x, list) else x).dtype
        served = serves(dtype, *(weight if isinstance(weight, list) else [weight]))
        # Looked up in the call: the ops do not exist before the extension is loaded, or without it.
        return (getattr(torch.ops.lorasb_csrc, name).default if served else eager_kernel)(x, weight, *others)

    return call


_forward = _extension_or_eager("dense_linear", eager.forward)
backward = _extension_or_eager("dense_linear_backward", eager.backward)
_group = _extension_or_eager("dense_group", partial(eager.group_forward, dropout=0.0, seeds=None))
_group_backward = _extension_or_eager("dense_group_backward", eager.group_backward_without_dropout)


def forward(x: Tensor, weight: Tensor | None, *others: Any) -> Any:
    """y and u; few tokens by the extension, without dropout alone."""
    few = others[-1] is None and serves_few(x, weight)
    return (torch.ops.lorasb_csrc.dense_linear.default if few else _forward)(x, weight, *others)


def group_forward(x: Tensor, weights: list[Tensor], *others: Any) -> Any:
    """The y_i, then the u_i. With dropout member by member: the extension's group knows no masks."""
    *lists, biases, scalings, dropout, seeds = others
    if seeds is None:
        few = serves_few(x, *weights)
        return (torch.ops.lorasb_csrc.dense_group.default if few else _group)(x, weights, *lists, biases, scalings)
    members = zip(weights, *lists, list(biases) or [None] * len(weights), scalings, strict=True)
    results = [forward(x, *member, dropout, eager.seed_of(seeds, i)) for i, member in enumerate(members)]
    return [y for y, _ in results] + [u for _, u in results]


def group_backward(dys: list[Tensor], weights: list[Tensor], *others: Any) -> Any:
    """dx, then the dR_i; with dropout member by member."""
    *lists, dropout, seeds, need_dx, need_dcore = others
    if seeds is None:
        return _group_backward(dys, weights, *lists, need_dx, need_dcore)
    given: Any = (*lists, dropout, seeds, need_dx, need_dcore)
    return eager.apart(backward, dys, weights, *given)


def _times_cores(left: Tensor, cores: Tensor, index: Tensor, scale: float, transposed: bool) -> Tensor:
    if torch.float64 in (left.dtype, cores.dtype):
        return eager_rows.times_cores(left, cores, index, scale, transposed)
    product: Tensor = torch.ops.lorasb_csrc.times_cores(left, _dense(cores), index, scale, not transposed)
    return product


def _dense(cores: Tensor) -> Tensor:
    """Cores [K, r, r], each R contiguous; a bank's have gaps between them."""
    return cores if cores.stride(2) == 1 and cores.stride(1) == cores.shape[2] else cores.contiguous()


def _thin(rows: Tensor, factor: Tensor) -> Tensor:
    """In fp32, as torch would take long in rows' dtype."""
    plain = factor.stride(-1) != 1  # Bᵀ and Aᵀ as views
    product: Tensor = torch.ops.lorasb_csrc.thin_product(rows, factor.t() if plain else factor, plain)
    return product


def _extended(
    rows: Tensor, weight: Tensor | None, quant: eager_rows.Quant, v: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    if rows.dtype == torch.float64 or (weight is not None and not serves(rows.dtype, weight)):
        return eager_rows.extended(rows, weight, quant, v, b, bias)
    shape = b.shape[0], rows.shape[1]
    y: Tensor = torch.ops.lorasb_csrc.extended_product(rows, weight, *quant, *shape, v, b, bias, False)
    return y


def _extended_transposed(
    rows: Tensor, weight: Tensor | None, quant: eager_rows.Quant, w: Tensor, a: Tensor, onto: Tensor | None = None
) -> Tensor:
    if rows.dtype == torch.float64 or (weight is not None and not serves(rows.dtype, weight)):
        return eager_rows.extended_transposed(rows, weight, quant, w, a, onto)
    shape = rows.shape[1], a.shape[1]
    dx: Tensor = torch.ops.lorasb_csrc.extended_product(rows, weight, *quant, *shape, w, a, None, True)
    return dx if onto is None else onto.add_(dx)


def _rows_forward(
    x: Tensor, weight: Tensor | None, quant: list[Tensor], layout: list[int], a: Tensor, cores: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (x.dtype, cores.dtype):
        return eager_rows.compute(_composed(x.dtype), x, weight, quant, layout, a, cores, *others)
    by_torch = weight is not None and not serves(x.dtype, weight)
    forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.lorasb_csrc.linear_rows.default
    return forward(x, weight, quant, layout, a, _dense(cores), *others, by_torch)


def _composed(dtype: torch.dtype) -> eager_rows.Products:
    """torch's thin products, except in 16 bits that the processor does not multiply."""
    widened = dtype != torch.float32 and serves(dtype)
    return eager_rows.Products(_thin if widened else eager_rows.thin, _times_cores, _extended, _extended_transposed)


def _products(dtype: torch.dtype) -> eager_rows.Products:
    return _composed(dtype)._replace(forward=_rows_forward)


KERNELS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("linear", forward),
    ("linear_backward", backward),
    ("linear_group", group_forward),
    ("linear_group_backward", group_backward),
    *eager_rows.kernels(_products),
)


def register() -> None:
    """Load the extension, which registers its kernels for the CPU, and register the dense ones."""
    global _reason
    _reason = _load()
    _forget()  # a call before this may have cached False
    if _reason is not None:
        logging.getLogger("lorasb").info("C++ kernels: %s; eager torch computes on the CPU", _reason)
    if _reason is None:
        register_backend("cpp", KERNELS, ("CPU",))
    # The registry has defined these ops, with or without an extension; `missing` decides whether they are recorded.
    kernels = {op: _below_autograd(backend_op(op, "cpp")) for op in OPS}
    register_loaded("cpp", kernels | {"serve_quantized": backend_op("serve_quantized", "cpp")}, missing)


def _load() -> str | None:
    """Load the extension; the reason if that is not possible."""
    global extension
    if os.environ.get(DISABLE) == "1":
        return f"{DISABLE}=1 leaves them out"
    cap = os.environ.get(CAP) or CAPS[0]
    if cap not in CAPS:
        raise ValueError(f"expected {CAP} to be one of {', '.join(CAPS)}, got {cap!r}")
    path = library()
    if path is None:
        return (
            "this build of lorasb has no C++ extension: install it where a C++ compiler is, with --no-build-isolation"
        )
    try:
        loaded = importlib.import_module("lorasb._C")  # registers its ops
        signatures.use(loaded.signature, loaded.metadata)
    except (ImportError, AttributeError) as error:
        return f"{path.name} does not load, it was built for another torch or lorasb ({error}): install lorasb again"
    extension = loaded
    return None


def _below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op called below the autograd key: direct callers have an autograd function of their own around it."""

    def call(*arguments: Any) -> Any:
        with private.BelowAutograd():
            return op(*arguments)

    return call
