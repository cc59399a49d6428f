"""Our 4-bit layer: made by `lorasb.quantize`, with its dense twin's outputs and bitsandbytes' file format."""

import copy

import pytest
import torch
from adapters import unchanged
from models import batches_for, llama, make
from quantized_models import to_bitsandbytes
from tolerances import EXACT, EXPORT, check
from torch import nn

import lorasb
from lorasb.functional import dequantize
from lorasb.layers import linear4bit
from lorasb.layers.linear4bit import Linear4bit

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
def test_files_of_ours_load_into_bitsandbytes_and_theirs_into_ours(nested: bool) -> None:
    dense = nn.Linear(128, 64)
    ours = lorasb.quantize(nn.Sequential(copy.deepcopy(dense)), nested=nested)[0]
    written = ours.state_dict()
    statistics = {k.removeprefix("weight."): v for k, v in written.items() if k.startswith("weight.")}
    theirs = bnb.nn.Params4bit.from_prequantized(written["weight"], statistics, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), dequantize(ours.quantized()))
    other = lorasb.quantize(nn.Sequential(nn.Linear(128, 64)), nested=nested)[0]
    other.load_state_dict(to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").state_dict())
    x = torch.randn(3, 128)
    check(other(x), ours(x), EXACT)
    with pytest.raises(RuntimeError, match="quant_map"):
        other.load_state_dict({k: v for k, v in written.items() if not k.endswith("quant_map")})
    written["weight.absmax"] = written["weight.absmax"][:-1]
    with pytest.raises(RuntimeError, match="scales"):
        other.load_state_dict(written)


def test_a_linear_of_4_bits_is_its_dense_twin() -> None:
    layer = lorasb.quantize(nn.Sequential(nn.Linear(96, 40)))[0]
    dense = dequantize(layer.quantized())
    x = torch.randn(2, 5, 96, requires_grad=True)
    want = torch.nn.functional.linear(x, dense, layer.bias)
    check(layer(x), want, EXPORT)
    assert "nf4" in repr(layer)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "nf3"}, "nf4, fp4"), ({"blocksize": 48}, "blocksize"), ({"exclude": ["0"]}, "no linear")],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: dict, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with unchanged(model), pytest.raises(ValueError, match=message):
        lorasb.quantize(model, **arguments)


def test_an_error_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantized = iter([linear4bit.quantize_4bit(model[0].weight)])
    monkeypatch.setattr(linear4bit, "quantize_4bit", lambda *_: next(quantized, None) or 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        lorasb.quantize(model)


def test_heads_are_left_and_a_weight_that_is_not_finite_changes_nothing() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with unchanged(model), pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        lorasb.quantize(model)
    model = lorasb.quantize(llama(), "fp4", blocksize=32)
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14


@pytest.mark.parametrize("family", ["roberta", "bert", "vit", "t5"])
def test_heads_of_tasks_and_weights_that_are_read_stay_dense_and_the_rest_trains(family: str) -> None:
    model = lorasb.patch(lorasb.quantize(make(family)), r=2, init="random")
    heads = [p for n, p in model.named_parameters() if p.requires_grad and "lorasb_R" not in n]
    assert bool(heads) == (family != "t5")
    assert all(p.is_floating_point() for p in heads)
    model(**batches_for(family)[0]).loss.backward()


def test_requantizing_needs_something_to_requantize() -> None:
    with pytest.raises(ValueError, match="quantized layer under an adapter, got none"):
        lorasb.patch(llama(), r=4, init="random").merge_and_unload(requantize=True)


def test_layers_of_an_adapter_that_is_not_merged_stay_as_they_are_packed() -> None:
    model = lorasb.patch(lorasb.quantize(llama()), r=4, init="random", target_modules=["q_proj"])
    model.add_adapter("other", lorasb.LoRASBConfig(r=4, init="random", target_modules=["up_proj"]))
    packed = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    plain = model.merge_and_unload(requantize=True)
    assert plain.model.layers[0].mlp.up_proj is packed
    assert len(plain.requantization_errors) == 2


@pytest.mark.parametrize("shape", [(3, 7), (5, 5)])
@pytest.mark.parametrize(
    "storages", [(torch.bfloat16, torch.uint8), (torch.float32, torch.bfloat16), (torch.uint8, torch.float32)]
)
def test_a_file_loads_into_another_storage(shape: tuple[int, int], storages: tuple[torch.dtype, torch.dtype]) -> None:
    """Whatever padding the file and the layer have."""
    saved, layer = (lorasb.quantize(nn.Sequential(nn.Linear(*shape)), storage=storage) for storage in storages)
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(*(dequantize(one[0].quantized()) for one in (layer, saved)))


def test_a_move_renews_what_compiled_forwards_read_and_one_that_fails_keeps_the_packed_weight() -> None:
    """Compiled forwards use the storage that was checked last, and do not look at the weight."""
    layer = lorasb.quantize(nn.Sequential(nn.Linear(64, 32)), storage=torch.bfloat16)[0]
    packed = layer.weight
    with pytest.raises(ZeroDivisionError):
        layer._apply(lambda tensor: tensor / (1 // 0))
    assert layer.weight is packed
    layer.quantized()
    layer._apply(lambda tensor: tensor.clone())
    assert layer._cached_weight is not None
    assert layer._cached_weight[1].tensors[0].data_ptr() == layer.weight.data_ptr()
