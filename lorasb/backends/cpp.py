"""The C++ backend. On CPUs the extension, if built, computes quantized layers, layers in 16-bit dtypes that the
processor cannot multiply, large fp32 weights on AVX2, and few tokens in bf16; eager torch computes the rest by BLAS.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ..kernels.operands import whole
from ..ops import calls, registry
from ..ops.adapted_linear import register_backend
from ..ops.calls import DENSE, Operands
from . import eager

DISABLE = "LORASB_NO_CSRC"  # environment variable: 1 runs without the extension
CAP = "LORASB_MAX_CPU_ISA"  # environment variable, read by the extension: the best instruction set to use
CAPS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# On AVX2 the BLAS was slower in fp32 with two threads. In 16 bits, without hardware support, torch takes 3
# to 5 times as long as fp32 in forward and about 100 times in backward; the extension widens W to fp32 panel by panel.
LARGE_WEIGHT = 1 << 21  # elements of W; from here on the extension is faster in fp32 (measured on two Zen 3 cores)
EXTENSION_OPS = (
    *("instruction_set", "instruction_sets", "use_instruction_set", "serves", "max_unpacked_tokens"),
    *("dense_linear", "dense_linear_backward", "dense_group", "dense_group_backward"),
    *("quantized_linear", "quantized_linear_backward", "linear_rows"),
    *("thin_product", "times_cores", "add_rows", "extended_product"),
)
_reason: str | None = "not loaded yet"
# The module, once loaded; besides its kernels it has functions that Python calls directly.
extension: ModuleType | None = None
serve_quantized: registry.Function | None = None  # the op, once loaded
# The extension's ops, filled when it loads: choosing an overload in every call takes as long as a small product.
_csrc = SimpleNamespace()


def library() -> Path | None:
    """Path of the extension built for this Python; None if there is none."""
    candidates = (Path(__file__).parents[1] / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def missing() -> str | None:
    """Return why the C++ kernels cannot run; None if they can."""
    return _reason


def instruction_set() -> str:
    """The instruction set whose kernels run: "AMX", "AVX-512 with bf16", "AVX-512", "AVX2" or "portable"."""
    return _csrc.instruction_set()


def instruction_sets() -> list[str]:
    return _csrc.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Use the kernels of one instruction set, "" for the best; raises a ValueError if the processor lacks it."""
    _csrc.use_instruction_set(name)
    _forget()


def serves(dtype: torch.dtype, weights: Sequence[Tensor] = ()) -> bool:
    """True if the extension computes dense layers of this dtype and these weights on a CPU."""
    return _multiplies(dtype) and (dtype != torch.float32 or any(one.numel() >= LARGE_WEIGHT for one in weights))


def computes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """True if the extension computes a dense forward; eager torch computes all others, with the BLAS."""
    if _multiplies(x.dtype):
        return serves(x.dtype, weights)
    if x.dtype != torch.bfloat16 or not weights:
        return False
    # few tokens: one call reads contiguous W's [out, in] in place; the BLAS takes four, and packs each W every time
    width = x.shape[-1]
    return all(w.is_contiguous() and 0 < x.numel() <= most_tokens(w.numel()) * width for w in weights)


@lru_cache
def most_tokens(elements: int) -> int:
    """Return the most tokens for which reading a W of this size in place is faster; 0 without such a product."""
    return 0 if _reason is not None else int(_csrc.max_unpacked_tokens(elements))


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    """True if the extension computes products of a dtype on the instruction set in use; cached, as each call asks."""
    return _reason is None and dtype in DTYPES and bool(_csrc.serves(dtype))


def _forget() -> None:
    for cached in (_multiplies, most_tokens, _products):
        cached.cache_clear()


def _flat(results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [y for y, _ in results] + [u for _, u in results]


def forward(x: Tensor, operands: Operands) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j [M, r]: by the extension where it serves them, else by eager torch."""
    if operands.row_index is not None:
        return _rows_forward(x, operands)
    base, layout, a, cores, b, biases, scalings, _, dropout, seeds = operands
    if layout[1]:
        bias = biases[0] if biases else None
        return list(_csrc.quantized_linear(x, base, layout, a[0], cores[0], b[0], bias, scalings[0], dropout, seeds))
    if not (serves(x.dtype, base) if seeds is not None else computes(x, base)):
        return eager.eager_forward(x, operands)
    if len(a) == 1:
        weight, bias = base[0] if base else None, biases[0] if biases else None
        return list(_csrc.dense_linear(x, weight, a[0], cores[0], b[0], bias, scalings[0], dropout, seeds))
    if seeds is None:
        return list(_csrc.dense_group(x, base, a, cores, b, biases, scalings))
    return _flat([_csrc.dense_linear(x, *one[:6], dropout, one.seed) for one in operands.members()])


def backward(dys: list[Tensor], us: list[Tensor], operands: Operands, need_dx: bool, need_dcores: bool) -> list[Tensor]:
    """dx [..., n], then the dR_j; a gradient that is not needed is an empty tensor."""
    base, layout, a, cores, b, _, scalings, index, dropout, seeds = operands
    dtype, need = dys[0].dtype, (need_dx, need_dcores)
    if index is not None:
        return eager.backward(_products(dtype), dys, us, operands, *need)
    if layout[1]:
        given = a[0], cores[0], b[0], us[0], scalings[0], dropout, seeds
        return list(_csrc.quantized_linear_backward(dys[0], base, layout, *given, *need))
    if not serves(dtype, base):
        return eager.eager_backward(dys, us, operands, *need)
    if len(a) > 1 and seeds is None:
        return list(_csrc.dense_group_backward(dys, base, a, cores, b, us, scalings, *need))
    results = [
        _csrc.dense_linear_backward(dy, one.base, one.a, one.core, one.b, u, one.scaling, dropout, one.seed, *need)
        for dy, u, one in zip(dys, us, operands.members(), strict=True)
    ]
    dx = results[0][0]
    for other, _ in results[1:] if need_dx else ():  # each has its own mask
        dx.add_(other)
    return [dx, *(dcore for _, dcore in results)]


def _rows_forward(x: Tensor, operands: Operands) -> list[Tensor]:
    if torch.float64 in (x.dtype, *(stack.dtype for stack in operands.cores)):
        return eager.eager_forward(x, operands)
    by_torch = bool(operands.base) and not operands.is_quantized and not serves(x.dtype, operands.base)
    results = []
    for one in operands.members():
        given = one.a, whole(one.core), one.b, one.bias, operands.row_index, one.scaling, by_torch
        results.append(_csrc.linear_rows(x, *_storage(one.base), *given))
    return _flat(results)


def times_core(left: Tensor, core: Tensor, index: Tensor | None, scale: float, transposed: bool) -> Tensor:
    """s·left_i R_kᵀ of every row, or s·left_i R_k, each R read in place; zero where k = -1."""
    if index is None or torch.float64 in (left.dtype, core.dtype):
        return eager.times_core(left, core, index, scale, transposed)
    return _csrc.times_cores(left, whole(core), index, scale, not transposed)


def add_rows(y: Tensor, x: Tensor, a: Tensor, cores: Tensor, b: list[Tensor], first: list[int], index: Tensor) -> None:
    """Add B R_k A x of a layer's parts to y [T, m] in place: a [parts·r, n], cores [K, parts, r, r], a B per part."""
    _csrc.add_rows(y, x, a, cores, b, first, index)


def _thin(rows: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    return _csrc.thin_product(rows, factor, not transposed)


def _extended_transposed(rows: Tensor, base: eager.Base, w: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    if base is None:
        dx = _products(rows.dtype).thin(w, a, False).to(rows.dtype)
    elif rows.dtype == torch.float64 or (isinstance(base, Tensor) and not serves(rows.dtype, [base])):
        return eager.extended_transposed(rows, base, w, a, onto)
    else:
        dx = _csrc.extended_product(rows, *_storage(base), rows.shape[1], a.shape[1], w, a, None, True)
    return dx if onto is None else onto.add_(dx)


def _storage(base: eager.Base) -> tuple[object, ...]:
    """Return W or None, then a quantized W's tensors and layout, as the extension takes them."""
    return (None, *base) if isinstance(base, tuple) else (base, [], list(DENSE))


@lru_cache
def _products(dtype: torch.dtype) -> eager.Products:
    """Return products with one R per row; torch computes thin ones, unless it is slow in the dtype."""
    widened = dtype != torch.float32 and serves(dtype)
    return eager.Products(_thin if widened else eager.thin, times_core, eager.extended, _extended_transposed)


def register() -> None:
    """Load the extension, which registers its kernels for the CPU, and register the dense ones."""
    global _reason
    _reason = _load()
    _forget()  # a call before this may have cached False
    registry.missing["cpp"] = missing
    if _reason is None:
        register_backend(("cpp", "auto"), ("CPU",), forward, backward, {})
    else:
        logging.getLogger("lorasb").info("C++ kernels: %s; eager torch computes on the CPU", _reason)


def _load() -> str | None:
    global extension, serve_quantized
    if os.environ.get(DISABLE) == "1":
        return f"{DISABLE}=1 disables them"
    cap = os.environ.get(CAP) or CAPS[0]
    if cap not in CAPS:
        raise ValueError(f"expected {CAP} to be one of {', '.join(CAPS)}, got {cap!r}")
    path = library()
    if path is None:
        return "this build of lorasb has no C++ extension: install lorasb with a C++ compiler and --no-build-isolation"
    try:
        loaded = importlib.import_module("lorasb._C")  # registers its ops
        vars(_csrc).update({name: getattr(torch.ops.lorasb_csrc, name).default for name in EXTENSION_OPS})
        calls.signature_of, calls.metadata = loaded.signature, loaded.metadata
    except (ImportError, AttributeError) as error:
        return f"{path.name} does not load, as it was built for another torch or lorasb ({error}): reinstall lorasb"
    extension, serve_quantized = loaded, registry.backend_op("serve_quantized", "cpp")
    return None
