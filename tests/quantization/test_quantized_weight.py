"""Quantized weights of modules: broken storages are refused, bytes counted, repacked weights converted back."""

from collections.abc import Callable

import pytest
import torch
from adapters import unchanged
from quantized_models import quantized, to_bitsandbytes
from storages import storage
from torch import nn

import lorasb
from lorasb.functional import dequantize
from lorasb.layers.linear import LoRASBLinear

bnb = pytest.importorskip("bitsandbytes")


def of_4_bits(**changes: object) -> nn.Module:
    layer = to_bitsandbytes(nn.Linear(128, 64), "nf4")
    for name, value in changes.items():
        setattr(layer.weight.quant_state, name, value)
    return layer


def cut(kind: str, name: str) -> nn.Module:
    """A layer whose storage, `data` or `SCB`, lacks its last entry."""
    layer = to_bitsandbytes(nn.Linear(128, 64), kind)
    setattr(layer.weight, name, getattr(layer.weight, name)[:-1])
    return layer


BROKEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "short": (lambda: cut("nf4", "data"), "4096 bytes"),
    "statistics": (lambda: of_4_bits(absmax=torch.ones(127)), "128 scales"),
    "block": (lambda: of_4_bits(blocksize=48), "block size"),
    "shape": (lambda: of_4_bits(shape=torch.Size([64, 96])), "bytes"),
    "nan": (lambda: of_4_bits(absmax=torch.tensor([1.0] * 127 + [float("nan")])), "NaN or Inf"),
    "inf": (lambda: of_4_bits(absmax=torch.tensor([1.0] * 127 + [float("inf")])), "NaN or Inf"),
    "type": (lambda: of_4_bits(quant_type="int4"), "'int4'"),
    "unquantized": (lambda: bnb.nn.Linear4bit(128, 64), "not been quantized"),
    "scales": (lambda: cut("int8", "SCB"), "64 row scales"),
    "16 bits": (lambda: bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=True), "16-bit weights"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_storage_that_is_not_whole_is_refused_by_name_and_the_model_stays(harm: str) -> None:
    broken, message = BROKEN[harm]
    model = nn.Sequential(nn.Linear(128, 128), broken())
    with unchanged(model), pytest.raises((ValueError, TypeError), match=rf"target '1'.*{message}"):
        lorasb.patch(model, target_modules=["0", "1"])


def test_4_bits_take_little_more_than_a_quarter_of_16() -> None:
    for nested, bound in ((False, 0.2813), (True, 0.2585)):
        tables = 64 + (256 * 4 if nested else 0)  # for a weight of any size
        assert (storage(256, 1024, nested=nested).nbytes - tables) / (256 * 1024 * 2) <= bound


def repacked(dtype: torch.dtype, nested: bool) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(128, 64, bias=False).to(dtype)
    layer = to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").eval()
    layer.support_avx512bf16_for_cpu = True
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    return layer


def test_what_bitsandbytes_repacked_is_converted_back_exactly_where_that_is_possible() -> None:
    base = LoRASBLinear(repacked(torch.bfloat16, False), "default", 4).base_layer
    torch.manual_seed(0)
    want = to_bitsandbytes(nn.Linear(128, 64, bias=False).bfloat16(), "nf4")
    assert torch.equal(base.weight.data, want.weight.data)
    assert torch.equal(base.weight.quant_state.absmax, want.weight.quant_state.absmax)
    theirs = bnb.functional.dequantize_4bit(want.weight.data, want.weight.quant_state)
    assert torch.equal(dequantize(base.weight), theirs)
    assert not base.support_avx512bf16_for_cpu
    base.eval()(torch.randn(1, 128).bfloat16())
    assert torch.equal(base.weight.data, want.weight.data)  # bitsandbytes' forward does not repack it again


@pytest.mark.parametrize(
    ("dtype", "nested", "why"), [(torch.float32, False, "float32"), (torch.bfloat16, True, "nested statistics")]
)
def test_what_cannot_be_converted_back_is_refused_with_the_reason(dtype: torch.dtype, nested: bool, why: str) -> None:
    model = nn.Sequential(repacked(dtype, nested))
    with pytest.raises(ValueError, match=rf"'0'.*{why}.*load the model again"):
        lorasb.patch(model, target_modules=["0"])
    assert type(model[0]) is bnb.nn.Linear4bit


def test_every_4_bit_layer_of_a_patched_model_stays_as_it_is_packed() -> None:
    model = quantized("nf4", torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    model = lorasb.patch(model, r=4, target_modules=["q_proj"])
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
