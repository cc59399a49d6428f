"""The C++ extension is loaded, chooses instruction sets, and never reads past the end of a tensor."""

import os
import random
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from processes import ROOT, run_each
from storages import bits_of, exact, storage
from torch import Tensor

import lorasb
from lorasb.backends import cpp
from lorasb.quantization.quantized_weight import QuantizedWeight

CASES = int(os.environ.get("LORASB_FUZZ_CASES", "10000"))
built = pytest.mark.skipif(cpp.missing() is not None, reason="no C++ extension")


@pytest.mark.skipif(
    shutil.which("c++") is None or os.environ.get(cpp.DISABLE) == "1", reason="no C++ compiler, or extension disabled"
)
def test_the_extension_is_loaded_where_a_compiler_is() -> None:
    assert cpp.missing() is None


DISABLED = f"""
import logging, os
os.environ[{cpp.DISABLE!r}] = "1"
logging.basicConfig(level=logging.INFO)
import torch, lorasb
from lorasb.quantization.quantizer import quantize_4bit; from lorasb.functional import dequantize
from lorasb.quantization.quantized_weight import of_state; from lorasb.functional import quantized_linear
w = of_state(*quantize_4bit(torch.randn(8, 64)))
print(quantized_linear(torch.ones(2, 64), w).sub(dequantize(w).sum(1)).abs().max().item() < 1e-4)
try:
    lorasb.backend('cpp').__enter__()
except RuntimeError as error:
    print(error)
"""
CAPPED = f"""
import os, torch
os.environ[{cpp.CAP!r}] = "portable"
from lorasb.backends import cpp
print(cpp.instruction_sets(), cpp.serves(torch.bfloat16))
"""
THREADS = """
import torch, lorasb.backends; from pathlib import Path
from lorasb.quantization.quantizer import quantize_4bit; from lorasb.functional import dequantize
from lorasb.quantization.quantized_weight import of_state
threads = lambda: len(list(Path('/proc/self/task').iterdir()))
w = of_state(*quantize_4bit(torch.randn(2048, 2048)))
torch.set_num_threads(3); torch.randn(1 << 22).sum(); before = threads()
dequantize(w); print(threads() - before)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each code prints in a separate process."""
    codes = [DISABLED, *((CAPPED, THREADS, MAPPED) if cpp.missing() is None else ())]
    paths = (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", ""))
    return dict(zip(codes, run_each(codes, PYTHONPATH=os.pathsep.join(filter(None, paths))), strict=True))


def test_without_the_extension_everything_works_and_one_line_says_so(printed: dict[str, str]) -> None:
    assert "True" in printed[DISABLED]
    assert "backend 'cpp' is not available" in printed[DISABLED]
    assert printed[DISABLED].count("C++ kernels: LORASB_NO_CSRC=1") == 1


@built
def test_instruction_sets_are_chosen_at_run_time() -> None:
    assert cpp.instruction_sets()[-1] == "portable"
    assert cpp.instruction_set() == cpp.instruction_sets()[0]
    for name in cpp.instruction_sets():
        cpp.use_instruction_set(name)
        assert cpp.instruction_set() == name
    cpp.use_instruction_set("")
    with pytest.raises(ValueError, match="expected one of"):
        cpp.use_instruction_set("MMX")


@built
def test_the_instruction_set_can_be_capped(printed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed[CAPPED] == "['portable'] True"
    monkeypatch.setenv(cpp.CAP, "mmx")
    message = "expected LORASB_MAX_CPU_ISA to be one of amx, avx512_bf16, avx512, avx2, portable, got 'mmx'"
    with pytest.raises(ValueError, match=message):
        cpp._load()


@built
def test_threads_are_torchs_own(printed: dict[str, str]) -> None:
    assert printed[THREADS] == "0"


class Drawn(NamedTuple):
    """Arguments that fit together, except perhaps for one."""

    m: int
    n: int
    quant: list[Tensor]
    layout: list[int]
    x: Tensor
    a: Tensor
    core: Tensor
    b: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return len(self.x) if self.x.dim() else 1

    def like(self, *size: int) -> Tensor:
        """Random numbers in the dtype of A."""
        return torch.randn(size).to(self.a.dtype)


LAYOUTS = ([0, 256, 0], [-64, 256, 0], [63, 256, 1], [64, 0, 0], [64, -1, 2], [64, 256, 7], [64, 256], [])
HARMS: dict[str, Callable[[random.Random, Tensor], list[Tensor]]] = {
    "shorter": lambda rng, one: [one.reshape(-1)[: max(0, one.numel() - rng.randint(1, 40))]],
    "longer": lambda rng, one: [torch.cat((one.reshape(-1), one.reshape(-1)[:1], torch.zeros(1, dtype=one.dtype)))],
    "dtype": lambda rng, one: [one.to(rng.choice([torch.float64, torch.int32, torch.uint8, torch.int8]))],
    "strided": lambda rng, one: [torch.stack((one.reshape(-1),) * 2, 1)[:, 0]],
    "gone": lambda rng, one: [],
}


def harmed(rng: random.Random, quant: list[Tensor], layout: list[int]) -> tuple[list[Tensor], list[int]]:
    i, harm = rng.randrange(len(quant)), rng.choice([*HARMS, "layout"])
    if harm == "layout":
        return quant, rng.choice(LAYOUTS)
    return [*quant[:i], *HARMS[harm](rng, quant[i]), *quant[i + 1 :]], layout


def packed(rng: random.Random, m: int, n: int) -> tuple[list[Tensor], list[int]]:
    """A weight in 4 bits, with nested scales or without, or in 8 bits."""
    block, kind = rng.choice([2, 32, 64, 128, 4096]), rng.choices(["plain", "nested", "int8"], [4, 4, 1])[0]
    layout, blocks = [block, 256, rng.choice([0, 1, 2])], -(-m * n // block)
    if kind == "int8":
        return [torch.randint(-127, 128, (m, n), dtype=torch.int8), torch.rand(m)], layout
    octets, scales = (torch.randint(0, 256, (count,), dtype=torch.uint8) for count in (-(-m * n // 2), blocks))
    if kind == "plain":
        return [octets, torch.rand(blocks), torch.rand(16)], layout
    return [octets, scales, *(torch.rand(count) for count in (16, -(-blocks // 256), 256, 1))], layout


def drawn(rng: random.Random) -> Drawn:
    m, n, r, M = rng.randint(0, 70), rng.randint(0, 140), rng.randint(0, 9), rng.choice([0, 1, 2, 5, 9, 90])
    quant, layout = packed(rng, m, n)
    if rng.random() < 0.6:
        quant, layout = harmed(rng, quant, layout)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    x, a, b, bias = (torch.randn(size).to(dtype) for size in ((M, n), (r, n), (m, r), (m,)))
    if rng.random() < 0.2:
        x = rng.choice([x[:, :-1], x.to(torch.int32), x[..., None], torch.tensor(1.0)])
    return Drawn(m, n, quant, layout, x, a, torch.randn(r, r), b, rng.choice([None, bias]))


def dequantize(rng: random.Random, d: Drawn) -> tuple[Any, tuple]:
    m, n, dtype = d.m, d.n, d.a.dtype
    if rng.random() < 0.5:
        m, n = rng.choice([(-1, n), (m, -5), (2**40, 2**40), (m + 1, n)])
    else:
        dtype = rng.choice([dtype, torch.int32, torch.complex64])
    return torch.ops.lorasb.dequantize_cpp, (d.quant, d.layout, m, n, dtype)


def serve(rng: random.Random, d: Drawn) -> tuple[Any, tuple]:
    factors = rng.choice([(d.a, d.core, d.b), (None, None, None), (d.a, None, d.b)])
    arguments = d.x, d.quant, d.layout, rng.choice([d.m, d.m + 1]), d.n, *factors, d.bias, 0.5
    return torch.ops.lorasb.serve_quantized_cpp, arguments


def linear(rng: random.Random, d: Drawn) -> tuple[Any, tuple]:
    arguments = d.x, d.quant, d.layout, d.a, d.core, d.b, d.bias, 0.5, 0.0, None
    return torch.ops.lorasb_csrc.quantized_linear, arguments


def backward(rng: random.Random, d: Drawn) -> tuple[Any, tuple]:
    dy, u = d.like(d.rows, d.m), d.like(rng.choice([d.rows, d.rows + 1]), len(d.a))
    needed = rng.random() < 0.8, rng.random() < 0.8
    arguments = dy, d.quant, d.layout, d.a, d.core, d.b, u, 0.5, 0.0, None, *needed
    return torch.ops.lorasb_csrc.quantized_linear_backward, arguments


def by_row(rng: random.Random, d: Drawn) -> tuple[Any, tuple]:
    """A call with an R for each row, or its backward, over a quantized weight, a dense one or none."""
    r, count = len(d.a), rng.randint(0, 3)
    cores = torch.randn(count, r, rng.choice([r] * 9 + [r + 1])).to(rng.choice([torch.float32, torch.bfloat16]))
    index = torch.randint(-1, max(count, 1), (d.rows,))
    if rng.random() < 0.2:
        index = rng.choice([index[1:], index - 1, index + 1, index.int(), index[:, None]])
    weight = rng.choice([None, d.like(d.m, d.n), d.like(d.m + 1, d.n)])
    quant, layout = (d.quant, d.layout) if weight is None and rng.random() < 0.6 else ([], [0, 0, 0])
    if rng.random() < 0.5:
        arguments = d.x, weight, quant, layout, d.a, cores, d.b, d.bias, index, 0.5, weight is not None
        return torch.ops.lorasb_csrc.linear_rows, arguments
    dy, u, base = d.like(d.rows, d.m), d.like(d.rows, r), quant if weight is None else [weight]
    dy = rng.choice([dy, dy, dy, dy.t().contiguous().t(), dy[:, :-1], dy[1:], dy.int()])
    others = [], [0.5], index, 0.0, None, rng.random() < 0.8, rng.random() < 0.8
    arguments = [dy], [u], base, layout, [d.a], [cores], [d.b], *others
    return torch.ops.lorasb.adapted_linear_backward_cpp, arguments


CALLS = (dequantize, serve, linear, backward, by_row)


@built
def test_parts_of_calls_by_row_check_what_they_read() -> None:
    parts = torch.ops.lorasb_csrc
    x, b, v, index = torch.randn(6, 48), torch.randn(48, 8), torch.randn(6, 8), torch.zeros(6, dtype=torch.int64)
    a, cores, weight = torch.randn(8, 48), torch.randn(1, 8, 8), torch.randn(48, 48)
    whole = weight, [], [0, 0, 0], a, cores, b, None, index, 1.0
    for error, call in (
        ("expected x .M, k. and a factor .k, n.", lambda: parts.thin_product(x[:, :40], b, True)),
        ("expected x .M, k. and a factor .n, k.", lambda: parts.thin_product(x, b, False)),
        ("expected x in fp32", lambda: parts.thin_product(x.double(), b, True)),
        ("expected x .M, 48.", lambda: parts.extended_product(x[:, 1:], weight, [], [], 48, 48, v, b, None, False)),
        ("expected x .M, 48.", lambda: parts.extended_product(x, weight, [], [], 48, 48, v[1:], b, None, False)),
        ("expected weight", lambda: parts.extended_product(x, weight[1:], [], [], 48, 48, v, b, None, False)),
        ("expected x in fp32", lambda: parts.linear_rows(x.double(), None, [], [0, 0, 0], a.double(), cores, b.double(), None, index, 1.0, False)),
        ("expected a weight", lambda: parts.linear_rows(x, None, *whole[1:], True)),
        ("expected x in fp32", lambda: parts.add_rows(x.double(), x.double(), a.double(), cores[None], [b], [0], index)),
        ("expected y .T, m.", lambda: parts.add_rows(x[1:], x, a, cores[None], [b], [0], index)),
        ("expected y .T, m.", lambda: parts.add_rows(x, x, a, cores[None], [b, b], [0, 0], index)),
        ("expected index in .-1, 1.", lambda: parts.add_rows(x, x, a, cores[None], [b], [0], index + 1)),
        ("expected x .M, k. and a factor .n, k.", lambda: parts.add_rows(x, x, a, cores[None], [b.t()], [0], index)),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError, IndexError), match=error):
            call()
    one = torch.randn(1, 1, 3)[:, :, :1]  # a single number, of any strides
    assert parts.times_cores(torch.ones(6, 1), one, index, 1.0, False).tolist() == [[float(one)]] * 6


@built
def test_ten_thousand_random_calls_end_in_a_result_or_an_error() -> None:
    rng, outcomes, names = random.Random(0), {"result": 0, "error": 0}, cpp.instruction_sets()
    torch.manual_seed(0)
    for case in range(CASES):
        if case % 500 == 0:
            cpp.use_instruction_set(names[case // 500 % len(names)])
        op, arguments = rng.choice(CALLS)(rng, drawn(rng))
        try:
            op(*arguments)
            outcomes["result"] += 1
        except (ValueError, TypeError, IndexError, RuntimeError):
            outcomes["error"] += 1
    cpp.use_instruction_set("")
    assert min(outcomes.values()) > CASES // 10, outcomes


# Tensors that end where a page ends: reading one more byte crashes the process.
MAPPED = """
import ctypes, torch
from itertools import product
from lorasb.backends import cpp
from storages import storage
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def at_the_end(t):
    size = t.numel() * t.element_size()
    room = -(-size // 4096) * 4096
    start = libc.mmap(None, room + 4096, 3, 0x22, -1, 0)
    assert libc.mprotect(start + room, 4096, 0) == 0
    raw = (ctypes.c_char * size).from_address(start + room - size)
    new = torch.frombuffer(raw, dtype=t.dtype, count=t.numel()).view(t.shape)
    new.copy_(t)
    return new
def drawn(dtype, *sizes):
    return [at_the_end(torch.randn(size).to(dtype)) for size in sizes]
options = None, 1.0, 0.0, None  # bias, scaling, dropout and its seed
for name in cpp.instruction_sets():
    cpp.use_instruction_set(name)
    sizes = (3, 64), (7, 192), (33, 128), (5, 96), (59, 123)
    for (m, n), block, nested, dtype in product(sizes, (32, 64, 128), (False, True), (torch.float32, torch.bfloat16)):
        w = storage(m, n, 'nf4', block, nested, dtype)
        base = [at_the_end(t) for t in w.tensors], w.layout(dtype)
        torch.ops.lorasb.dequantize_cpp(*base, m, n, dtype)
        for M in (1, 5, 100):
            x, dy, a, b = drawn(dtype, (M, n), (M, m), (3, n), (m, 3))
            factors = a, *drawn(torch.float32, (3, 3)), b
            y, u = torch.ops.lorasb_csrc.quantized_linear(x, *base, *factors, *options)
            torch.ops.lorasb_csrc.quantized_linear_backward(dy, *base, *factors, u, *options[1:], True, True)
            torch.ops.lorasb.gradient_signs_cpp(dy, x, None, True)
    sizes = (3, 64), (33, 128), (59, 123), (130, 17)
    for (m, n), dtype, M in product(sizes, (torch.float32, torch.bfloat16, torch.float16), (1, 5, 100)):
        x, dy, w, a, b = drawn(dtype, (M, n), (M, m), (m, n), (3, n), (m, 3))
        factors = a, *drawn(torch.float32, (3, 3)), b
        y, u = torch.ops.lorasb_csrc.dense_linear(x, w, *factors, *options)
        torch.ops.lorasb_csrc.dense_linear_backward(dy, w, *factors, at_the_end(u), *options[1:], True, True)
print('whole')
"""


@built
def test_nothing_past_the_end_of_a_mapping_is_read(printed: dict[str, str]) -> None:
    assert printed[MAPPED].endswith("whole")


@built
def test_weights_with_nan_scales_spoil_nothing_else() -> None:
    weight = storage(8, 128, dtype=torch.float32)
    scales = weight.tensors[1].clone()
    scales[2] = float("nan")
    spoiled = QuantizedWeight([weight.tensors[0], scales, weight.tensors[2]], weight.shape, weight.dtype, "nf4", 64)
    with lorasb.backend("cpp"):
        dense = torch.ops.lorasb.dequantize_cpp(spoiled.tensors, spoiled.layout(torch.float32), 8, 128, torch.float32)
    clean = torch.isfinite(dense)
    assert torch.equal(bits_of(dense)[clean], bits_of(exact(weight, torch.float32))[clean])
    assert int((~clean).sum()) == 64
