"""Dequantization to the bit: every kernel against the definition, and against bitsandbytes."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from storages import bits_of, exact, octets, storage
from tolerances import check_equal

from lorasb.functional import dequantize
from lorasb.quantization.quantized_weight import BLOCKS, QuantizedWeight, QuantState
from lorasb.quantization.quantizer import _grid, code, dynamic_map, quantize_4bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (59, 123), (1, 1), (3, 7), (123, 64), (5, 192), (16, 4096), (0, 64), (64, 0))
bnb = pytest.importorskip("bitsandbytes")


@functools.cache
def weights(stored: torch.dtype) -> list[tuple[QuantizedWeight, torch.Tensor]]:
    """Storages of all kinds, block sizes and shapes, with their values in the dtype `stored`."""
    cases = itertools.product(("nf4", "fp4"), BLOCKS, (False, True), SHAPES)
    found = [
        storage(*shape, kind, block, nested, stored) for kind, block, nested, shape in cases if all(shape) or not nested
    ]
    found += [octets(*shape, stored) for shape in SHAPES]
    return [(weight, exact(weight, stored)) for weight in found]


def parameter(packed: torch.Tensor, state: object) -> torch.nn.Parameter:
    return bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)


def theirs(weight: torch.Tensor, kind: str, block: int, nested: bool) -> tuple[torch.Tensor, Any]:
    return bnb.functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_is_the_definition_to_the_bit(kernel: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    for weight, values in weights(stored):
        assert torch.equal(bits_of(dequantize(weight, dtype)), bits_of(values.to(dtype))), weight


def test_octets_are_bitsandbytes_own(kernel: str) -> None:
    weight = octets(33, 65, torch.float32)
    assert torch.equal(dequantize(weight), bnb.functional.int8_vectorwise_dequant(*weight.tensors))


@functools.cache
def by_bitsandbytes(kind: str, dtype: torch.dtype) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Weights that bitsandbytes quantized, with the values that it dequantizes."""
    g, found = torch.Generator().manual_seed(1), []
    for block, nested, m in itertools.product(BLOCKS, (False, True), (64, 7)):
        weight = torch.randn(m, block if m == 64 else 2 * block, generator=g).to(dtype)
        packed, state = theirs(weight, kind, block, nested)
        found.append((parameter(packed, state), bnb.functional.dequantize_4bit(packed, state)))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_is_bitsandbytes_own(kernel: str, kind: str, dtype: torch.dtype) -> None:
    for packed, values in by_bitsandbytes(kind, dtype):
        assert torch.equal(dequantize(packed), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_byte_is_met(kernel: str, kind: str) -> None:
    octet = torch.arange(256, dtype=torch.uint8)
    for scale in (1.0, -1.0, 0.0, 1e-20, 3e-39, 1e38):
        weight = QuantizedWeight([octet, torch.full((8,), scale), code(kind)], (8, 64), torch.float32, kind, 64)
        for dtype in DTYPES:
            assert torch.equal(bits_of(dequantize(weight, dtype)), bits_of(exact(weight, dtype)))


def test_a_dense_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="quant_state"):
        dequantize(torch.randn(8, 64))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_quantizer_is_bitsandbytes_own(dtype: torch.dtype, kind: str, nested: bool) -> None:
    g = torch.Generator().manual_seed(2)
    for block in BLOCKS:
        for m, n in ((1, 1), (59, 123), (64, 64), (256, 512)):
            weight = (torch.randn(m, n, generator=g) * 0.05).to(dtype)
            packed, state = theirs(weight, kind, block, nested)
            ours, found = quantize_4bit(weight, kind, block, nested)
            check_equal([ours, found.absmax, found.code], [packed, state.absmax, state.code])
            if nested:
                ours, reference = ([each.state2.absmax, each.state2.code, each.offset] for each in (found, state))
                check_equal(ours, reference)


@contextmanager
def bf16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta"), bf16_by_default])
def test_statistics_do_not_depend_on_what_surrounds_them(around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Tables are created at first use; a state dict stores the mean of nested scales as a number."""
    _, state = quantize_4bit(torch.randn(8, 64), nested=True)
    tables = ((code, ("nf4",)), (code, ("fp4",)), (dynamic_map, ()), (_grid, ()))
    expected = [make(*given) for make, given in tables]
    written = state.as_tensors()
    for make, _ in tables:
        make.cache_clear()
    with around():
        found = [make(*given) for make, given in tables]
        offset = QuantState.of_tensors(written).offset
    check_equal([*found, offset], [*expected, state.offset])
    assert not any(table.is_inference() for table in found)


def test_zero_blocks_stay_zero() -> None:
    for nested in (False, True):
        packed, state = quantize_4bit(torch.zeros(4, 64), "nf4", 64, nested)
        reference, _ = theirs(torch.zeros(4, 64), "nf4", 64, False)
        assert torch.equal(packed, reference)
        assert not dequantize(parameter(packed, state)).any()
