"""Models in 4 and 8 bits, bitsandbytes' and our own: patched, initialized, trained, saved, exported, merged."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import llama, text
from storages import exact
from tolerances import EXACT, EXPORT, MERGE, PROCESS_SUMS, check
from torch import nn

import lorasb
from lorasb.functional import dequantize
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.linear4bit import Linear4bit
from lorasb.quantization.quantized_weight import of_module
from lorasb.quantization.quantizer import quantize_4bit

bnb = pytest.importorskip("bitsandbytes")
KINDS = ("own", "own nested", "nf4", "fp4 nested", "int8")


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama whose linears are quantized."""
    torch.manual_seed(0)
    model = llama().to(dtype)
    if kind.startswith("own"):
        return lorasb.quantize(model, nested="nested" in kind)
    for name, parent in list(model.named_modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and child != "lm_head":
                assert name
                setattr(parent, child, to_bitsandbytes(layer, kind))
    return model


def to_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
    bias = layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=bias, quant_type=kind[:3], compress_statistics="nested" in kind)  # fmt: skip
        new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), quant_type=kind[:3], compress_statistics="nested" in kind)  # fmt: skip
    if bias:
        new.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return new.to("cpu")


def dense_twin(model: nn.Module) -> nn.Module:
    """The same function with dense linears."""
    twin = copy.deepcopy(model)
    for name, parent in list(twin.named_modules()):
        for child, layer in list(parent.named_children()):
            weight = of_module(layer) if isinstance(layer, nn.Linear) else None
            if weight is not None:
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
                dense.weight.data = exact(weight, torch.float32)
                setattr(parent, child, dense)
            assert name or layer
    return twin


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [text(2, 12, seed) for seed in range(count)]


def factors(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, LoRASBLinear)]
    return [
        p.detach().clone()
        for m in layers
        for p in (m.lorasb_A["default"], m.lorasb_R["default"], m.lorasb_B["default"])
    ]


def initialized(kind: str, **options: object) -> nn.Module:
    model = lorasb.patch(quantized(kind), r=4)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False, **options)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dequantized_twin_in_forward_and_gradients(kind: str) -> None:
    model = quantized(kind)
    twin = dense_twin(model)
    model, twin = lorasb.patch(model, r=4), lorasb.patch(twin, r=4)
    lorasb.initialize(twin, batches(), lr=1e-2, progress=False)
    for layer, other in zip(
        *([m for m in each.modules() if isinstance(m, LoRASBLinear)] for each in (model, twin)), strict=True
    ):
        layer.set_factors("default", other.lorasb_B["default"], other.lorasb_R["default"], other.lorasb_A["default"])
    results = []
    for each in (model, twin):
        each.train()
        loss = each(**batches()[0]).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        check(one, other, PROCESS_SUMS)


@pytest.mark.parametrize("kind", KINDS)
def test_both_strategies_give_the_same_factors(kind: str) -> None:
    one, other = (initialized(kind, strategy=strategy) for strategy in ("layerwise", "accumulate"))
    for first, second in zip(factors(one), factors(other), strict=True):
        check(first, second, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_take_turns_and_the_storage_stays(kind: str) -> None:
    model = initialized(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    assert any("SCB" in name or "absmax" in name for name in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    batch, losses = batches()[0], []
    for _ in range(6):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(**batch)
            with model.disable_adapter():
                model(**batch)
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["own nested", "nf4", "int8"])
def test_trainer_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {name: value[0] for name, value in text(1, 12, i).items()}

    model = initialized(kind)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2)  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    done = factors(model)
    again = initialized(kind)
    trainer = transformers.Trainer(model=again, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for first, second in zip(done, factors(again), strict=True):
        check(first, second, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    model = initialized(kind).eval()
    want = model(**batches()[0]).logits
    model.save_pretrained(tmp_path / "adapter")
    check(
        peft.PeftModel.from_pretrained(quantized(kind), tmp_path / "adapter").eval()(**batches()[0]).logits, want, EXACT
    )
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    plain = peft.PeftModel.from_pretrained(dense_twin(quantized(kind)), tmp_path / "lora").eval()
    check(plain(**batches()[0]).logits, want, EXPORT)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_dense_layers_and_unmerging_the_storage_back(kind: str) -> None:
    model = initialized(kind).eval()
    want, bases = model(**batches()[0]).logits, [m.base_layer for m in model.modules() if isinstance(m, LoRASBLinear)]
    model.merge_adapter()
    check(model(**batches()[0]).logits, want, MERGE)
    model.unmerge_adapter()
    assert [m.base_layer for m in model.modules() if isinstance(m, LoRASBLinear)] == bases
    check(model(**batches()[0]).logits, want, EXACT)
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    check(merged(**batches()[0]).logits, want, MERGE)


@pytest.mark.parametrize("kind", ["own nested", "nf4"])
def test_merging_back_into_4_bits_tells_the_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = initialized(kind).eval()
    dense = copy.deepcopy(model).merge_and_unload()
    with caplog.at_level(logging.WARNING, logger="lorasb"):
        packed = model.merge_and_unload(requantize=True)
    assert "requantized 14 layers" in caplog.text
    for name, error in packed.requantization_errors.items():
        layer, wide = packed.get_submodule(name), dense.get_submodule(name).weight
        assert isinstance(layer, Linear4bit)
        assert layer.quant_state.nested == ("nested" in kind)
        found = (dequantize(layer.quantized(), torch.float32) - wide).norm() / wide.norm()
        assert error == pytest.approx(float(found), rel=1e-5)
        assert 0.01 < error < 0.2
    packed(**batches()[0])


def test_requantizing_needs_something_to_requantize() -> None:
    model = lorasb.patch(llama(), r=4)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False)
    with pytest.raises(ValueError, match="has none"):
        model.merge_and_unload(requantize=True)


def test_a_merge_that_is_not_finite_leaves_the_storage() -> None:
    model = initialized("nf4")
    layer = next(m for m in model.modules() if isinstance(m, LoRASBLinear))
    base = layer.base_layer
    layer.lorasb_R["default"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload()
    assert layer.base_layer is base
    assert not layer.merged


def repacked(dtype: torch.dtype, nested: bool) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(128, 64, bias=False).to(dtype)
    layer = to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").eval()
    layer.support_avx512bf16_for_cpu = True
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    return layer


def test_what_bitsandbytes_repacked_is_converted_back_exactly_where_that_is_possible() -> None:
    want = to_bitsandbytes((torch.manual_seed(0), nn.Linear(128, 64, bias=False).bfloat16())[1], "nf4")
    layer = LoRASBLinear(repacked(torch.bfloat16, False), "default", 4)
    base = layer.base_layer
    assert torch.equal(base.weight.data, want.weight.data)
    assert torch.equal(base.weight.quant_state.absmax, want.weight.quant_state.absmax)
    assert torch.equal(
        dequantize(base.weight), bnb.functional.dequantize_4bit(want.weight.data, want.weight.quant_state)
    )
    assert not base.support_avx512bf16_for_cpu
    base.eval()(torch.randn(1, 128).bfloat16())
    assert torch.equal(base.weight.data, want.weight.data), (
        "bitsandbytes' own forward leaves the weight alone from now on"
    )


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


def broken(harm: str) -> nn.Module:
    layer = to_bitsandbytes(nn.Linear(128, 64), "nf4")
    state = layer.weight.quant_state
    if harm == "short":
        layer.weight.data = layer.weight.data[:-8]
    elif harm == "statistics":
        state.absmax = state.absmax[:-1]
    elif harm == "block":
        state.blocksize = 48
    elif harm == "shape":
        state.shape = torch.Size([64, 96])
    elif harm == "nan":
        state.absmax[5] = float("nan")
    elif harm == "type":
        state.quant_type = "int4"
    elif harm == "unquantized":
        return bnb.nn.Linear4bit(128, 64)
    elif harm == "scales":
        layer = to_bitsandbytes(nn.Linear(128, 64), "int8")
        layer.weight.SCB = layer.weight.SCB[:-1]
    elif harm == "16 bits":
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=True)
    return layer


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("short", "4096 bytes"),
        ("statistics", "128 scales"),
        ("block", "block size"),
        ("shape", "bytes"),
        ("nan", "NaN or Inf"),
        ("type", "'int4'"),
        ("unquantized", "not been quantized"),
        ("scales", "64 row scales"),
        ("16 bits", "16-bit weights"),
    ],
)
def test_a_storage_that_is_not_whole_is_refused_by_name_and_the_model_stays(harm: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), broken(harm))
    kind = type(model[1])
    with pytest.raises((ValueError, TypeError), match=rf"target '1'.*{message}"):
        lorasb.patch(model, target_modules=["0", "1"])
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is kind


def test_files_of_ours_load_into_bitsandbytes_and_theirs_into_ours() -> None:
    for nested in (False, True):
        dense = nn.Linear(128, 64)
        ours = lorasb.quantize(nn.Sequential(copy.deepcopy(dense)), nested=nested)[0]
        written = ours.state_dict()
        theirs = bnb.nn.Params4bit.from_prequantized(written["weight"], {k.removeprefix("weight."): v for k, v in written.items() if k.startswith("weight.")}, device="cpu")  # fmt: skip
        assert torch.equal(
            bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), dequantize(ours.quantized())
        )
        other = lorasb.quantize(nn.Sequential(nn.Linear(128, 64)), nested=nested)[0]
        other.load_state_dict(to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").state_dict())
        x = torch.randn(3, 128)
        check(other(x), ours(x), EXACT)
        damaged = {k: v for k, v in written.items() if not k.endswith("quant_map")}
        with pytest.raises(RuntimeError, match="quant_map"):
            other.load_state_dict(damaged)
        written["weight.absmax"] = written["weight.absmax"][:-1]
        with pytest.raises(RuntimeError, match="scales"):
            other.load_state_dict(written)


def test_a_linear_of_4_bits_on_its_own() -> None:
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
def test_quantize_refuses(arguments: dict, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=message):
        lorasb.quantize(model, **arguments)
    assert type(model[0]) is nn.Linear


def test_quantize_leaves_heads_and_changes_nothing_where_a_weight_is_not_finite() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        lorasb.quantize(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    model = lorasb.quantize(llama(), "fp4", blocksize=32)
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14


def test_weights_in_memory() -> None:
    for nested, bound in ((False, 0.2813), (True, 0.2585)):
        dense = torch.randn(256, 1024).bfloat16()
        packed, state = quantize_4bit(dense, "nf4", 64, nested)
        parameter = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        layer = nn.Module()
        layer.weight, layer.bias = parameter, None
        found = of_module(layer)
        constant = 64 + (256 * 4 if nested else 0)  # the tables, whatever the size
        assert (found.nbytes - constant) / (dense.numel() * 2) <= bound


def test_other_layers_work_on_a_dense_base_as_before() -> None:
    layer = LoRASBLinear(nn.Linear(64, 32), "default", 4)
    assert layer.quantized() is None
    assert layer.base_dtype == torch.float32
