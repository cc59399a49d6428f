"""Adapters for embeddings, convolutions and attention: W + s·B R A replaces the parameter, and G is its gradient."""

import copy
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from adapters import layers, trained, unchanged
from basis_models import fill
from models import llama, logits, make, opt
from networks import PARAMETERS, TARGETS, Net, batch, loss
from tolerances import BF16_FEW, ENERGY, EXACT, EXPORT, FP64, MERGE, check, check_scaled
from torch import Tensor, nn
from torch.func import functional_call

import lorasb
from lorasb.layers.adapted_layer import AdaptedLayer
from lorasb.layers.weight_adapter import LoRASBEmbedding


def adapted(model: nn.Module) -> dict[str, Any]:
    return layers(model, AdaptedLayer)


def patched(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return lorasb.patch(Net().to(dtype), **{"r": 3, "target_modules": TARGETS, "init": "kaiming"} | options)


def holding(layer: nn.Module, **options: Any) -> Any:
    """A network of one layer, with an adapter."""
    net = nn.Sequential(OrderedDict(one=layer))
    return lorasb.patch(net, **{"r": 2, "target_modules": ["one"], "init": "kaiming"} | options).eval()


def effective(model: Any) -> dict[str, Tensor]:
    """Return the plain network's parameters with W + s·B R A computed from the factors alone, in fp64."""
    weights = {name: p.detach().double() for name, p in Net().named_parameters()}
    for name, layer in adapted(model).items():
        b, core, a = (part["default"].double() for part in (layer.lorasb_B, layer.lorasb_R, layer.lorasb_A))
        delta = layer.scaling["default"] * b @ core @ a
        weight = weights[PARAMETERS[name]]
        weights[PARAMETERS[name]] = weight + (delta.t() if name == "embed" else delta.reshape(weight.shape))
    return weights


@pytest.mark.parametrize("train", [False, True])
def test_the_output_and_the_gradient_of_r_are_those_of_the_sum_of_weights(train: bool) -> None:
    model = patched(torch.float64).train(train)
    plain = Net().double().train(train)
    cores, target = [layer.lorasb_R["default"] for layer in adapted(model).values()], batch()["target"].double()
    found, want = model(batch()["ids"]), functional_call(plain, effective(model), (batch()["ids"],))
    check(found, want, FP64)
    gradients, expected = (torch.autograd.grad((y - target).square().mean(), cores) for y in (found, want))
    check(gradients, expected, FP64)
    assert all(gradient.norm() > 0 for gradient in gradients)
    assert trained(model) == {f"base_model.model.{name}.lorasb_R.default" for name in PARAMETERS}


@pytest.mark.parametrize("strategy", ["auto", "accumulate"])
def test_an_initialization_takes_the_first_step_of_full_fine_tuning(strategy: str) -> None:
    """B and A are the leading factors of -sign(G), where G is autograd's gradient of a parameter over the samples."""
    model = patched(init="update")
    batches = [batch(seed) for seed in range(3)]
    lorasb.initialize(model, batches, lr=1e-2, loss_fn=loss, strategy=strategy, progress=False)
    plain = Net()
    for one in batches:
        (loss(plain, one) * len(one["ids"])).backward()
    parameters = dict(plain.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, layer in adapted(model).items():
        assert getattr(layer, "tap", None) is None
        gradient = parameters[PARAMETERS[name]].grad
        step = -(gradient.t() if name == "embed" else gradient.flatten(1)).sign()
        b, a = layer.lorasb_B["default"].detach(), layer.lorasb_A["default"].detach()
        kept, best = (b.t() @ step @ a.t()).square().sum(), torch.linalg.svdvals(step)[:3].square().sum()
        assert kept > ENERGY * best, name
        core = layer.lorasb_R["default"].detach()
        assert torch.equal(core, core.diag().diag())


def test_per_sample_moments_are_of_linear_layers_only() -> None:
    model = patched(init="update")
    with unchanged(model), pytest.raises(ValueError, match=r"per-sample.*an embedding, a convolution or attention"):
        lorasb.initialize(model, [batch()], lr=1e-2, loss_fn=loss, update="per-sample", progress=False)


def test_the_export_is_what_pefts_lora_reads(tmp_path: Path) -> None:
    """From a model and from a folder; PEFT has special names and shapes for embeddings and convolutions."""
    targets = ["embed", "conv", "image", "head"]
    model, ids = patched(target_modules=targets).eval(), batch()["ids"]
    want = model(ids)
    lorasb.export_lora(model, tmp_path / "a", quiet=True)
    model.save_pretrained(tmp_path / "saved")
    lorasb.export_lora(tmp_path / "saved", tmp_path / "b", quiet=True)
    for folder in ("a", "b"):
        plain = peft.PeftModel.from_pretrained(Net(), tmp_path / folder).eval()
        assert not adapted(plain)
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


def test_rows_choose_adapters_of_embeddings_and_convolutions() -> None:
    targets = ["embed", "conv", "grouped", "image", "head"]
    model = lorasb.patch(Net(), r=3, target_modules=targets, init="kaiming").eval()
    x, found = torch.randn(6, 8, 7), adapted(model)
    for name, value in (("embed", batch()["ids"]), ("conv", x)):
        layer = found[name]
        mixed = layer(value, adapter_names=["default", "__base__"] * 3)
        check(mixed[0::2], layer(value)[0::2], EXPORT)
        check(mixed[1::2], layer.base_layer(value)[1::2], EXPORT)
    attention: Any = patched().base_model.model.attention
    with pytest.raises(ValueError, match="attention has three"):
        attention(x, x, x, adapter_names=["default"] * 6)


def test_weights_computed_in_every_forward_and_of_several_widths_are_refused() -> None:
    """For example, in wav2vec2's positional convolution an adapted weight would be overwritten."""
    for layer, message in (
        (nn.utils.weight_norm(nn.Conv1d(4, 4, 3)), "is a Conv1d whose weight is computed in every"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "is a .*Conv1d whose weight is computed in every"),
        (nn.Embedding(9, 4, max_norm=1.0), "is a Embedding whose weight is computed"),
        (nn.MultiheadAttention(12, 3, kdim=8, vdim=8), "is a MultiheadAttention: .*with one width"),
    ):
        with pytest.raises(TypeError, match=f"'one' {message}"):
            holding(layer)


class Scaled(nn.Conv1d):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


def test_an_argument_of_a_convolutions_own_is_refused_and_not_dropped() -> None:
    model = holding(Scaled(4, 4, 3))
    with pytest.raises(TypeError, match="positional arguments"):
        model.base_model.model.one(torch.randn(1, 4, 8), 2.0)


def test_small_updates_of_a_convolution_survive_bf16() -> None:
    """They are added to the base's output: W + s·B R A in bf16 would round 2^-9 of W away."""
    torch.manual_seed(0)
    conv = nn.Conv1d(32, 32, 1, bias=False, dtype=torch.bfloat16)
    layer = holding(conv, r=4, init="random").base_model.model.one
    with torch.no_grad():
        layer.lorasb_R["default"].fill_(1e-4)
        layer.base_layer.weight.zero_()
        alone = layer(torch.ones(1, 32, 1, dtype=torch.bfloat16))
        want = layer.get_delta_weight("default").flatten(1).sum(1)
    check_scaled(alone.flatten(), want, BF16_FEW)
    assert (alone != 0).any()


def test_an_offloaded_base_says_so() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 3))
    accelerate.cpu_offload(net, execution_device="cpu")
    model = lorasb.patch(net, r=2, target_modules=["0"], init="random")
    with pytest.raises(RuntimeError, match="a Conv1d under an adapter cannot be offloaded"):
        model(torch.randn(1, 4, 5))


def test_dropout_of_a_convolution_drops_its_input_on_the_adapters_path() -> None:
    """Only the adapter's path has dropout, scaled by 1 / (1 - p): the mean over many masks is the result without it."""
    model = lorasb.patch(Net(), r=3, target_modules=["conv"], init="kaiming", lora_dropout=0.5)
    layer: Any = model.base_model.model.conv
    x = torch.randn(2, 8, 7)
    with torch.no_grad():
        whole = layer.eval()(x)
        torch.manual_seed(0)
        runs = layer.train()(x.repeat(2000, 1, 1)).unflatten(0, (2000, 2))
    assert (runs[0] - whole).abs().max() > 1e-2
    spread = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - whole).abs() < 6 * spread + 1e-4).all()


@pytest.mark.parametrize("target", ["self_attn", "linear1"])
def test_an_encoder_layer_of_torch_does_not_read_past_the_adapter(target: str) -> None:
    """In evaluation without gradients, torch's layer would pass the attention's plain weights to a kernel."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = lorasb.patch(net, r=2, target_modules=[target], init="kaiming").eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        inference = model(x)
    check(inference, model(x).detach(), EXPORT)
    assert (inference - copy.deepcopy(model).unload()(x)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("target", ["self_attn", "linear1"])
def test_padded_rows_go_through_an_adapted_encoder_of_torch(target: str) -> None:
    """torch's encoder would make nested tensors of them, which only the kernel that bypasses adapters accepts."""
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, pad = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = net(x, src_key_padding_mask=pad)
    model = lorasb.patch(net, r=2, target_modules=[target], init="kaiming").eval()
    with torch.no_grad():
        masked = model(x, src_key_padding_mask=pad)
        check(masked[1, :3], model(x[1:, :3])[0], EXPORT)
        check(model.unload()(x, src_key_padding_mask=pad), before, EXACT)


def test_a_compiled_network_is_one_graph_and_computes_the_same() -> None:
    model = patched()
    fill(model, "default", 0)

    def step(run: Any) -> list[Tensor]:
        model.zero_grad()
        value = loss(run, batch())
        value.backward()
        return [value.detach(), *(layer.lorasb_R["default"].grad.clone() for layer in adapted(model).values())]

    check(step(torch.compile(model, fullgraph=True, backend="aot_eager")), step(model), EXACT)


def test_an_embedding_of_positions_looks_up_what_it_computes() -> None:
    """OPT's takes a mask and looks up counts of its ones: the adapter has to use its forward."""
    torch.manual_seed(0)
    model = lorasb.patch(opt(), r=3, target_modules=["embed_positions"], init="kaiming").eval()
    want = logits(model)
    check(logits(model.merge_and_unload()), want, MERGE)


def test_one_module_in_two_places_is_adapted_in_both() -> None:
    net = nn.Module()
    torch.manual_seed(0)
    net.first = net.second = nn.Embedding(9, 4)
    net.forward = lambda ids: net.second(ids)
    model = lorasb.patch(net, r=2, target_modules=["first"], init="kaiming").eval()
    base: Any = model.base_model.model
    assert isinstance(base.first, LoRASBEmbedding)
    assert base.second is base.first
    assert (base.second(torch.arange(9)) - base.second.base_layer.weight).abs().max() > 1e-3
    plain: Any = model.unload()
    assert type(plain.first) is nn.Embedding
    assert plain.second is plain.first


def test_half_of_a_tied_embedding_is_refused() -> None:
    """T5's stacks look tokens up in embeddings that share `shared`'s weight: an adapter on `shared` does nothing."""
    with pytest.raises(ValueError, match=r"'shared' shares its weight with the embedding '\w+\.embed_tokens'"):
        lorasb.patch(make("t5"), r=3, target_modules=["shared"], init="random")


def test_a_head_tied_to_an_input_embedding_of_any_class_is_refused() -> None:
    model: Any = nn.Sequential(OrderedDict(table=nn.Bilinear(2, 3, 4), head=nn.Linear(6, 12)))
    model.table.weight = model.head.weight
    model.get_input_embeddings = lambda: model.table
    with pytest.raises(ValueError, match="'head' shares its weight with the embedding 'table'"):
        lorasb.patch(model, r=2, target_modules=["head"])


def test_sparse_gradients_and_ids_by_name() -> None:
    torch.manual_seed(0)
    model = holding(nn.Embedding(12, 6, sparse=True), init="update")
    layer = model.base_model.model.one
    ids = torch.arange(8).view(2, 4)
    squares = {"loss_fn": lambda m, batch: m(batch["x"]).square().mean()}
    lorasb.initialize(model, [{"x": ids}], lr=1e-2, progress=False, **squares)
    mixed = layer(input=ids, adapter_names=["default", "__base__"])
    check(mixed[0], layer(ids)[0], EXPORT)
    check(mixed[1], layer.base_layer(ids)[1], EXPORT)


def test_a_scaled_embedding_scales_its_adapter() -> None:
    """Gemma's embeddings scale what they look up."""

    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    layer = holding(Scaled(10, 6)).base_model.model.one
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    check(layer(torch.arange(10)), 4.0 * merged, EXPORT)


def test_a_tied_head_keeps_its_weight_when_the_embedding_is_merged() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT warns in any case
        model = lorasb.patch(llama(), r=4, target_modules=["embed_tokens", "q_proj"], init="kaiming").eval()
    base: Any = model.base_model.model
    head, want = base.lm_head.weight, logits(model)
    assert isinstance(base.model.embed_tokens, LoRASBEmbedding)
    before = head.detach().clone()
    with pytest.warns(UserWarning, match="tied_target_modules"):  # merging in PEFT would change the head
        model.merge_adapter()
    check(logits(model), want, MERGE)
    check(head.detach(), before, EXACT)
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert base.model.embed_tokens.base_layer.weight is head
    assert logits(model).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with the embedding 'model\.embed_tokens'"):
        lorasb.patch(llama(), r=4, target_modules=["lm_head"])


def test_threads_do_not_take_a_weight_with_an_adapter_for_the_weight() -> None:
    model = holding(nn.MultiheadAttention(16, 2, batch_first=True))
    before, x = model.base_model.model.one.get_base_layer().in_proj_weight.clone(), torch.randn(2, 5, 16)

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return model.base_model.model.one(x, x, x)[0]

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        check(list(pool.map(call, range(400))), [expected] * 400, EXACT)
    check(model.unload().one.in_proj_weight, before, EXACT)
