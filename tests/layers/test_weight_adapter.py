"""Embeddings, convolutions and attention under adapters: W + s·B R A in the parameter's place, G from its own gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tolerances import BF16_FEW, ENERGY, EXACT, EXPORT, FP64, MERGE, check
from torch import Tensor, nn
from torch.func import functional_call
from unfolded_models import PARAMETERS, TARGETS, Net, batch, loss

import lorasb
from lorasb.layers.adapted_layer import AdaptedLayer
from lorasb.layers.weight_adapter import unfoldings


def adapted(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    found = {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    assert set(found) == set(PARAMETERS) or not isinstance(getattr(model, "base_model", None).model, Net)
    return found


def patched(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return lorasb.patch(Net().to(dtype), **{"r": 3, "target_modules": TARGETS, "init": "kaiming"} | options)


def effective(model: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every parameter of the plain network as W + s·B R A, from the factors alone, in fp64."""
    weights = {name: p.detach().to(dtype) for name, p in Net().named_parameters()}
    for name, layer in adapted(model).items():
        b, core, a = (part["default"].to(dtype) for part in (layer.lorasb_B, layer.lorasb_R, layer.lorasb_A))
        delta = layer.scaling["default"] * b @ core @ a
        weight = weights[PARAMETERS[name]]
        weights[PARAMETERS[name]] = weight + (delta.t() if name == "embed" else delta.reshape(weight.shape))
    return weights


def test_unfolded_shapes_are_those_of_pefts_lora() -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted(patched()).items()}
    assert shapes == {
        "embed": (8, 20),
        "conv": (12, 24),
        "grouped": (12, 12),
        "image": (6, 6),
        "attention": (108, 36),
        "attention.base_layer": (36, 36),
        "head": (4, 36),
    }


@pytest.mark.parametrize("train", [False, True])
def test_the_output_and_the_gradient_of_r_are_those_of_the_sum_of_weights(train: bool) -> None:
    model = patched(torch.float64).train(train)
    plain = Net().double().train(train)
    cores = {name: layer.lorasb_R["default"] for name, layer in adapted(model).items()}
    want = functional_call(plain, effective(model), (batch()["ids"],))
    check(model(batch()["ids"]), want, FP64)
    target = batch()["target"].double()
    (want - target).square().mean().backward()
    expected = {name: core.grad.clone() for name, core in cores.items()}
    model.zero_grad()
    (model(batch()["ids"]) - target).square().mean().backward()
    for name, core in cores.items():
        assert core.grad.norm() > 0
        check(core.grad, expected[name], FP64)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.lorasb_R.default" for name in PARAMETERS
    }


@pytest.mark.parametrize("strategy", ["auto", "accumulate"])
def test_an_initialization_takes_the_first_step_of_full_fine_tuning(strategy: str) -> None:
    """B and A are the leading factors of -sign(G), G being autograd's gradient of each parameter over the samples."""
    model = patched(init="update")
    batches = [batch(seed) for seed in range(3)]
    lorasb.initialize(model, batches, lr=1e-2, loss_fn=loss, strategy=strategy, progress=False)
    plain = Net()
    for one in batches:
        rows = len(one["ids"])
        (loss(plain, one) * rows).backward()
    parameters = dict(plain.named_parameters())
    for name, layer in adapted(model).items():
        gradient = parameters[PARAMETERS[name]].grad
        step = -(gradient.t() if name == "embed" else gradient.flatten(1)).sign()
        b, a = layer.lorasb_B["default"].detach(), layer.lorasb_A["default"].detach()
        kept, best = (b.t() @ step @ a.t()).square().sum(), torch.linalg.svdvals(step)[:3].square().sum()
        assert kept > ENERGY * best, name
        core = layer.lorasb_R["default"].detach()
        assert torch.equal(core, core.diag().diag())


def test_no_gradient_is_left_and_the_taps_are_gone() -> None:
    model = patched(init="update")
    lorasb.initialize(model, [batch()], lr=1e-2, loss_fn=loss, progress=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(getattr(layer, "tap", None) is None for layer in adapted(model).values())


def test_per_sample_moments_are_of_linear_layers_only() -> None:
    model = patched(init="update")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"per-sample.*an embedding, a convolution or attention"):
        lorasb.initialize(model, [batch()], lr=1e-2, loss_fn=loss, update="per-sample", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_saving_and_disabling(tmp_path: Path) -> None:
    model, ids = patched().eval(), batch()["ids"]
    want, base = model(ids), Net().eval()(ids)
    assert (want - base).abs().max() > 1e-2
    with model.disable_adapter():
        check(model(ids), base, EXACT)
    model.save_pretrained(tmp_path)
    check(peft.PeftModel.from_pretrained(Net(), tmp_path).eval()(ids), want, EXACT)
    model.merge_adapter()
    check(model(ids), want, MERGE)
    model.unmerge_adapter()
    check(model(ids), want, MERGE)
    plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in Net().modules()]
    check(plain(ids), want, MERGE)


def test_the_export_is_what_pefts_lora_reads(tmp_path: Path) -> None:
    """From a model and from a folder: embeddings and convolutions have names and shapes of their own there."""
    targets = ["embed", "conv", "image", "head"]
    model, ids = patched(target_modules=targets).eval(), batch()["ids"]
    want = model(ids)
    lorasb.export_lora(model, tmp_path / "a", quiet=True)
    model.save_pretrained(tmp_path / "saved")
    lorasb.export_lora(tmp_path / "saved", tmp_path / "b", quiet=True)
    for folder in ("a", "b"):
        plain = peft.PeftModel.from_pretrained(Net(), tmp_path / folder).eval()
        assert not [layer for layer in plain.modules() if isinstance(layer, AdaptedLayer)]
        check(plain(ids), want, EXPORT)
    for name, message in (("grouped", "a convolution in groups"), ("attention", "nn.MultiheadAttention")):
        with pytest.raises(ValueError, match=f"'{name}.*' is {message}.*merge_and_unload"):
            lorasb.export_lora(patched(target_modules=[name]), tmp_path / "c")


def test_unloading_gives_the_modules_back_and_a_failed_patch_leaves_them() -> None:
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match="rank 9 is more than layer 'embed' allows"):
        lorasb.patch(net, r=9, target_modules=TARGETS)
    assert dict(net.named_modules()) == before
    plain = lorasb.patch(net, r=3, target_modules=TARGETS, init="random").unload()
    assert dict(plain.named_modules()) == before


def test_two_adapters_switch_and_go_together() -> None:
    model, ids = patched().eval(), batch()["ids"]
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, target_modules=TARGETS, init="kaiming", init_seed=1))
    first = model(ids)
    model.set_adapter("second")
    second = model(ids)
    assert (first - second).abs().max() > 1e-2
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default")
    model.delete_adapter("second")
    check(model(ids), first, EXACT)


def test_rows_choose_adapters_of_embeddings_and_convolutions() -> None:
    targets = ["embed", "conv", "grouped", "image", "head"]
    model = lorasb.patch(Net(), r=3, target_modules=targets, init="kaiming").eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    ids = batch()["ids"]
    x = torch.randn(6, 8, 7)
    for name, value in (("embed", ids), ("conv", x)):
        layer = layers[f"base_model.model.{name}"]
        mixed = layer(value, adapter_names=["default", "__base__"] * 3)
        check(mixed[0::2], layer(value)[0::2], EXPORT)
        check(mixed[1::2], layer.base_layer(value)[1::2], EXPORT)
    attention: Any = patched().base_model.model.attention
    with pytest.raises(ValueError, match="attention has three"):
        attention(x, x, x, adapter_names=["default"] * 6)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_is_computed_in_every_forward_is_refused(wrap: Any) -> None:
    """As wav2vec2's convolution of positions: what took the weight's place would be overwritten."""
    net = nn.Sequential()
    net.conv = wrap(nn.Conv1d(4, 4, 3))
    with pytest.raises(TypeError, match=r"'conv' is a .*Conv1d whose weight is computed in every forward"):
        lorasb.patch(net, r=2, target_modules=["conv"], init="random")
    net.embed = nn.Embedding(9, 4, max_norm=1.0)
    with pytest.raises(TypeError, match="'embed' is a Embedding whose weight is computed"):
        lorasb.patch(net, r=2, target_modules=["embed"], init="random")


def test_small_updates_of_a_convolution_survive_bf16() -> None:
    """Beside the base: W + s·B R A in bf16 would round what is 2^-9 of W away."""
    net = nn.Sequential()
    torch.manual_seed(0)
    net.conv = nn.Conv1d(32, 32, 1, bias=False)
    model = lorasb.patch(net.to(torch.bfloat16), r=4, target_modules=["conv"], init="random")
    layer: Any = model.base_model.model.conv
    with torch.no_grad():
        layer.lorasb_R["default"].fill_(1e-4)
        layer.base_layer.weight.zero_()
        alone = layer(torch.ones(1, 32, 1, dtype=torch.bfloat16))
        want = layer.get_delta_weight("default").flatten(1).sum(1)
    check(alone.flatten().float() / want.abs().max(), want / want.abs().max(), BF16_FEW)
    assert (alone != 0).any()


def test_an_offloaded_base_says_so() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential()
    net.conv = nn.Conv1d(4, 4, 3)
    accelerate.cpu_offload(net, execution_device="cpu")
    model = lorasb.patch(net, r=2, target_modules=["conv"], init="random")
    with pytest.raises(RuntimeError, match="a Conv1d under an adapter cannot be offloaded"):
        model(torch.randn(1, 4, 5))


def test_dropout_of_a_convolution_drops_its_input_on_the_adapters_path() -> None:
    """With R's path alone, dropped inputs scale by 1 / (1 - p): the mean over many masks is the result without."""
    model = lorasb.patch(Net(), r=3, target_modules=["conv"], init="kaiming", lora_dropout=0.5)
    layer: Any = model.base_model.model.conv
    x = torch.randn(2, 8, 7)
    with torch.no_grad():
        whole = layer.eval()(x)
        layer.train()
        torch.manual_seed(0)
        runs = torch.stack([layer(x) for _ in range(2000)])
    assert (runs[0] - whole).abs().max() > 1e-2
    spread = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - whole).abs() < 6 * spread + 1e-4).all()


def test_an_encoder_layer_of_torch_does_not_read_past_the_adapter() -> None:
    """In evaluation without gradients it would hand the attention's plain weights to a kernel."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = lorasb.patch(net, r=2, target_modules=["self_attn"], init="kaiming").eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        inference = model(x)
    check(inference, model(x).detach(), EXPORT)
    assert (inference - copy.deepcopy(model).unload()(x)).abs().max() > 1e-3


def test_attention_with_widths_of_its_own_is_refused() -> None:
    net = nn.Sequential()
    net.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=8)
    assert unfoldings(net.attention) == []
    with pytest.raises(TypeError, match=r"'attention' is a MultiheadAttention: expected .*with one width"):
        lorasb.patch(net, r=2, target_modules=["attention"])


def test_a_compiled_network_is_one_graph_and_computes_the_same() -> None:
    model = patched()
    for layer in adapted(model).values():
        layer.lorasb_R["default"].data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))

    def step(run: Any) -> list[Tensor]:
        model.zero_grad()
        value = loss(run, batch())
        value.backward()
        return [value.detach(), *(layer.lorasb_R["default"].grad.clone() for layer in adapted(model).values())]

    for one, other in zip(step(torch.compile(model, fullgraph=True, backend="aot_eager")), step(model), strict=True):
        check(one, other, EXACT)
