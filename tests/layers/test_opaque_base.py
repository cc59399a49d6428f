"""Adapters on quantized linears, lorasb's and others': equal to their dense twins, and W is never copied."""

import gc
import logging
import re
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import check_training, layers, unchanged
from gradients import factors
from models import llama
from quantized_models import (
    CALLED,
    MAKERS,
    STORED,
    Scaled,
    batches,
    dense_twin,
    initialized,
    patched,
    quantized,
    stand_in,
    to_hqq,
    torchao_int4_config,
    values,
)
from tolerances import EXACT, EXPORT, FOUR_BITS, MERGE, PROCESS_SUMS, SAME_STEP, check, check_equal
from torch import Tensor, nn
from trainer_runs import train

import lorasb
from lorasb.layers import opaque_base
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.linear4bit import Linear4bit
from lorasb.quantization.quantized_weight import is_quantized

ALL = (*STORED, *CALLED)
GIVE_W = [kind for kind in CALLED if kind != "unknown"]
REQUANTIZE = ("own nested", "nf4", "hqq", "quanto")  # torchao, if transformers loaded the model: has a separate test


@pytest.mark.parametrize("kind", ALL)
def test_a_model_is_its_dense_twin_in_forward_and_gradients(kind: str) -> None:
    model, twin = patched(kind), lorasb.patch(dense_twin(quantized(kind)), r=4)
    lorasb.initialize(twin, batches(), lr=1e-2, progress=False)
    for layer, other in zip(layers(model).values(), layers(twin).values(), strict=True):
        layer.set_factors("default", other.lorasb_B["default"], other.lorasb_R["default"], other.lorasb_A["default"])
    results = []
    for each in (model, twin):
        loss = each.train()(**batches()[0]).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(results[0]) == 15  # the loss and seven layers of two blocks
    check(*results, PROCESS_SUMS)


# the kinds left out differ in bits, not in code
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("own", "nf4", "fp4 nested")])
def test_both_strategies_give_the_factors_of_the_dense_twin(kind: str) -> None:
    """Products B R A are compared with the twin's, not factors: singular vectors may rotate in their last bits."""
    one, other = (initialized(kind, strategy=strategy) for strategy in ("layerwise", "accumulate"))
    check_equal(factors(one), factors(other))
    twin = lorasb.patch(dense_twin(quantized(kind)), r=4)
    lorasb.initialize(twin, batches(), lr=1e-2, progress=False)
    for layer, dense in zip(layers(one).values(), layers(twin).values(), strict=True):
        mine, theirs = layer.get_delta_weight("default"), dense.get_delta_weight("default")
        assert torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > SAME_STEP


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("own", "fp4 nested")])
def test_training_lowers_the_loss_and_leaves_the_storage(kind: str) -> None:
    model = initialized(kind)
    before = {name: contents(layer.base_layer) for name, layer in layers(model).items()}
    check_training(model)
    for name, layer in layers(model).items():
        check_equal(contents(layer.base_layer), before[name])


def contents(layer: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors that store W if lorasb reads them, else W."""
    if is_quantized(layer):
        return {name: tensor.clone() for name, tensor in layer.state_dict().items() if isinstance(tensor, Tensor)}
    return {"W": values(layer, torch.float32)}


@pytest.mark.parametrize("kind", CALLED)
def test_16_bit_models_compute_in_16_bits_with_r_in_fp32(kind: str) -> None:
    model = patched(kind, torch.bfloat16)
    for layer in layers(model).values():
        dtypes = [part["default"].dtype for part in (layer.lorasb_A, layer.lorasb_R, layer.lorasb_B)]
        assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    lorasb.initialize(model, batches(), lr=1e-2, progress=False)
    y = model(**batches()[0])
    assert y.logits.dtype == torch.bfloat16
    y.loss.backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


RESUMED = ("own nested", "torchao int8", "unknown")  # a few suffice: the same call makes both bases


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in RESUMED else pytest.mark.long) for kind in ALL]
)
def test_a_trainer_initializes_and_resumes_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    done = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        callback = lorasb.InitCallback(num_samples=4)
        done.append(factors(train(patched(kind), tmp_path, [callback], resume=resume).model))
    check_equal(*done)


@pytest.mark.parametrize("kind", ALL)
def test_adapters_are_saved_loaded_exported_and_chosen_by_rows(kind: str, tmp_path: Path) -> None:
    model, batch = initialized(kind).eval(), batches()[0]
    want = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(kind), tmp_path / "adapter").eval()
    check(again(**batch).logits, want, EXACT)
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    plain = peft.PeftModel.from_pretrained(dense_twin(quantized(kind)), tmp_path / "lora").eval()
    check(plain(**batch).logits, want, EXPORT)
    batch.pop("labels")
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["default", "__base__"]).logits
        with model.disable_adapter():
            base = model(**batch).logits
    check(mixed[0], want[0], PROCESS_SUMS)
    check(mixed[1], base[1], PROCESS_SUMS)
    assert (mixed[0] - base[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*STORED, *GIVE_W])
def test_merging_gives_dense_layers_and_unmerging_the_layers_back(kind: str) -> None:
    model = initialized(kind).eval()
    want, bases = model(**batches()[0]).logits, [layer.base_layer for layer in layers(model).values()]
    model.merge_adapter()
    check(model(**batches()[0]).logits, want, MERGE)
    model.unmerge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases
    check(model(**batches()[0]).logits, want, EXACT)
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if hasattr(m, "in_features")} == {nn.Linear}
    check(merged(**batches()[0]).logits, want, MERGE)


@pytest.mark.parametrize("kind", REQUANTIZE)
def test_requantizing_gives_the_same_format_and_reports_its_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes' layers become lorasb's own."""
    model = initialized(kind).eval()
    merged_weights = {name: layer.merged_weight(["default"]) for name, layer in layers(model).items()}
    kinds = {name: Linear4bit if kind in STORED else type(layer.base_layer) for name, layer in layers(model).items()}
    with caplog.at_level(logging.WARNING, logger="lorasb"):
        plain: Any = model.merge_and_unload(requantize=True)
    assert "requantized 14 layers" in caplog.text
    for name, want in merged_weights.items():
        layer = plain.get_submodule(name)
        assert type(layer) is kinds[name]
        relative = float((values(layer, torch.float32) - want).norm() / want.norm())
        assert plain.requantization_errors[name] == pytest.approx(relative, rel=1e-3)
        assert (0.01 if kind in STORED else 0) < relative < FOUR_BITS
        if kind in STORED:
            assert layer.quant_state.nested == ("nested" in kind)
    assert not any(p.requires_grad for p in plain.get_submodule("model.layers").parameters())
    plain(**batches()[0])


def test_torchao_is_quantized_again_where_the_model_says_how() -> None:
    """transformers stores the configuration, and PEFT's resolver passes it on."""
    model: Any = quantized("torchao int4")
    config = transformers.TorchAoConfig(torchao_int4_config())
    model.hf_quantizer = types.SimpleNamespace(quantization_config=config)
    adapter = lorasb.patch(model, r=4, init="random")
    assert all(layer.base.requantizes for layer in layers(adapter).values())
    plain = adapter.merge_and_unload(requantize=True)
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert type(weight) is type(quantized("torchao int4").model.layers[0].mlp.up_proj.weight)
    assert max(plain.requantization_errors.values()) < FOUR_BITS
    without = initialized("torchao int8")
    with pytest.raises(ValueError, match=r"torchao layer .* cannot be quantized again"):
        without.merge_and_unload(requantize=True)
    assert len(layers(without)) == 14


def test_torchao_with_int8_activations_is_served_and_merged_but_not_trained() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def base() -> Any:
        torch.manual_seed(0)
        model: Any = llama().eval()
        quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
        return model

    with pytest.raises(TypeError, match=r"a torchao layer, has no gradient of its input"):
        lorasb.patch(base(), r=4, init="random")
    model = lorasb.patch(base(), r=4, init="kaiming", inference_mode=True)
    with torch.no_grad():
        want, plain = model(**batches()[0]).logits, base()(**batches()[0]).logits
        assert (want - plain).abs().max() > 1e-3
        merged = model.merge_and_unload()(**batches()[0]).logits
    assert (merged - want).norm() < FOUR_BITS * (want - plain).norm()  # activations are no longer rounded


def test_what_gives_no_weight_refuses_to_merge_and_says_what_to_do() -> None:
    model = initialized("unknown").eval()
    want = model(**batches()[0]).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be read from Scaled layers .*lorasb\.export_lora"):
            merge()
    check(model(**batches()[0]).logits, want, EXACT)
    with pytest.raises(ValueError, match=r"init='update' and 'random' do not read W"):
        patched("unknown", init="lora-xs")


def test_a_weight_of_another_shape_than_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = next(iter(layers(initialized("unknown")).values())).base
    weight = values(base.module, torch.float32)
    monkeypatch.setattr(base, "backend", types.SimpleNamespace(get_base_weight=lambda _: weight))
    check_equal(base.weight(), weight)
    monkeypatch.setattr(base, "backend", types.SimpleNamespace(get_base_weight=lambda _: weight[:-1]))
    expected, found = list(weight.shape), list(weight[:-1].shape)
    with pytest.raises(ValueError, match=re.escape(f"expected a weight {expected} of a Scaled layer, got {found}")):
        base.weight()


@pytest.mark.parametrize("kind", GIVE_W)
def test_inits_without_data_read_the_dequantized_weight(kind: str) -> None:
    for layer in layers(patched(kind, init="lora-xs")).values():
        weight = values(layer.base_layer, torch.float32)
        u, s, vt = torch.linalg.svd(weight)
        best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
        b, a = layer.lorasb_B["default"], layer.lorasb_A["default"]
        check((b @ a).detach(), best, PROCESS_SUMS)


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "hqq", "quanto", partial(to_hqq, del_orig=False)])
def test_all_linear_finds_the_layers_and_not_what_is_inside_or_kept_of_the_original(kind: Any) -> None:
    found = layers(lorasb.patch(quantized(kind), r=4, check_base=False))
    assert len(found) == 14
    assert not any("linear_layer" in name for name in found)


def matrices() -> list[Tensor]:
    """Return all matrices of W's size that are alive in this process."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point() and t.shape == (64, 64)]


@pytest.mark.parametrize("kind", CALLED)
def test_no_weight_is_copied(kind: str) -> None:
    MAKERS[kind](nn.Linear(64, 64))  # skips early if the package is not installed
    of_other_tests = matrices()
    model = initialized(kind)
    model.train()(**batches()[0]).loss.backward()
    own = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    known = {id(t) for t in (*of_other_tests, *own, *gradients)}
    assert all(id(t) in known for t in matrices())


INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
STAND_INS = (
    ("aqlm", "QuantizedLinear", "is_aqlm_available", "aqlm"),
    ("eetq", "EetqLinear", "is_eetq_available", "eetq"),
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear", "is_gptqmodel_available", "GPTQ"),
    (INC, "PatchedLinear", "is_inc_available", "inc"),
)


@pytest.mark.parametrize(("module", "class_name", "available", "name"), STAND_INS)
def test_formats_that_need_a_gpu_are_known_by_pefts_resolver(
    monkeypatch: pytest.MonkeyPatch, module: str, class_name: str, available: str, name: str
) -> None:
    """A stand-in with the class's name replaces the package: all of PEFT's code runs, but no kernel of the package."""
    adapter = lorasb.patch(quantized(stand_in(monkeypatch, module, class_name, available)), r=4)  # found by format
    assert {layer.base.name for layer in layers(adapter).values()} == {name}
    lorasb.initialize(adapter, batches(), lr=1e-2, progress=False)
    adapter.train()(**batches()[0]).loss.backward()
    with pytest.raises(ValueError, match=f"cannot be read from {name} layers"):
        adapter.merge_and_unload()


def test_a_merged_base_is_released_when_the_model_is_unloaded() -> None:
    model = initialized("quanto")
    layer = weakref.ref(next(iter(layers(model).values())).base_layer)
    plain = model.merge_and_unload()
    del model
    gc.collect()
    assert layer() is None
    del plain


def holding(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(proj=kind(nn.Linear(8, 6, bias=False))))


def opaque(name: str, forward: Callable[[Scaled, Tensor], Tensor]) -> type[Scaled]:
    return type(name, (Scaled,), {"forward": forward})


def fail(layer: Scaled, x: Tensor) -> Tensor:
    raise RuntimeError("no such kernel")


Bent = opaque("Bent", lambda layer, x: nn.functional.gelu(Scaled.forward(layer, x)) + 3)  # not even affine
Affine = opaque("Affine", lambda layer, x: Scaled.forward(layer, x) + 3)
Cut = opaque("Cut", lambda layer, x: Scaled.forward(layer, x.detach()))
Broken = opaque("Broken", fail)
Missing = opaque("EetqLinear", fail)  # of a package that is not installed


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bent, r"target 'proj' \(Bent\) is not linear, as 2x does not give 2y"),
        (Cut, r"'proj', a Cut layer, has no gradient of its input"),
        (Broken, r"'proj' is a Broken that failed on x \[3, in\] \(no such kernel\), or name it in exclude_modules"),
        (Missing, "pip install eetq"),
    ],
)
def test_one_probe_finds_what_cannot_be_adapted(kind: type[nn.Module], message: str) -> None:
    model = holding(kind)
    state = torch.get_rng_state()
    with unchanged(model), pytest.raises(TypeError, match=message):
        lorasb.patch(model, r=2, target_modules=["proj"], init="random")
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_gradient_an_adapter_can_still_be_served() -> None:
    adapter = lorasb.patch(holding(Cut), r=2, target_modules=["proj"], init="random", inference_mode=True)
    assert isinstance(adapter.base_model.model.proj, LoRASBLinear)


def test_affine_is_linear_and_dense_layers_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lorasb.patch(holding(Affine), r=2, target_modules=["proj"], init="random")
    asked = []
    monkeypatch.setattr(opaque_base, "resolve_quantization_backend", lambda *_, **__: asked.append(1))
    lorasb.patch(llama(), r=4)
    assert not asked


def test_an_opaque_base_is_compiled_with_its_adapter() -> None:
    model = holding(Scaled)
    adapter = lorasb.patch(model, r=2, target_modules=["proj"], init="random")
    model.proj.lorasb_R["default"].data.copy_(torch.eye(2))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    check(compiled(x), adapter(x), EXACT)
    assert not torch.equal(adapter(x), model.proj.base_layer(x))


def test_a_resolver_that_finds_a_package_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        raise ImportError("torchao 0.1 is too old, only versions above 0.16 are supported")

    monkeypatch.setattr(peft.utils.quantization_utils, "is_torchao_available", too_old)
    model = holding(Scaled)
    with pytest.raises(ImportError, match=re.escape("torchao 0.1 is too old")):
        lorasb.patch(model, r=2, target_modules=["proj"])
    assert type(model.proj) is Scaled
