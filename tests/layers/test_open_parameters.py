"""Adapters for parameters of any module: GPT-OSS's and Llama-4's experts, weights without a linear."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import layers, unchanged
from basis_models import fill
from gradients import autograd_sums
from models import SIZES, logits, text
from tolerances import ENERGY, EXACT, FP64, MERGE, check
from torch import Tensor, nn
from torch.func import functional_call

import lorasb
from lorasb.layers.adapted_layer import AdaptedLayer
from lorasb.layers.lookup import discard

SHAPE = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "num_local_experts": 4}


def gpt_oss() -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SHAPE, max_position_embeddings=4096 * 32, pad_token_id=0)
    config._experts_implementation = "eager"  # grouped matrix products do not support fp64
    return transformers.GptOssForCausalLM(config).eval()


def llama4() -> Any:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**SHAPE, intermediate_size_mlp=64, pad_token_id=0)
    return transformers.Llama4ForCausalLM(config).eval()


MODELS = {"gpt-oss": (gpt_oss, "mlp.experts"), "llama4": (llama4, "feed_forward.experts")}


def targets(where: str) -> list[str]:
    return [f"{where}.gate_up_proj", f"{where}.down_proj"]


def patched(kind: str, **options: Any) -> Any:
    make, where = MODELS[kind]
    return lorasb.patch(make(), r=3, target_modules=["q_proj"], target_parameters=targets(where), **options)


def slices(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {name: layer for name, layer in layers(model, AdaptedLayer).items() if "experts" in name}


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_and_gradients_are_those_of_the_sum_of_weights(kind: str) -> None:
    model = patched(kind, init="kaiming").double()
    plain = MODELS[kind][0]().double()
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    cores = [layer.lorasb_R["default"] for layer in layers(model, AdaptedLayer).values()]
    for name, layer in layers(model, AdaptedLayer).items():
        parameter, _, index = name.rpartition(".")
        b, a = layer.lorasb_B["default"].double(), layer.lorasb_A["default"].double()
        delta = layer.scaling["default"] * b @ layer.lorasb_R["default"] @ a
        if "experts" in name:
            whole = torch.zeros_like(weights[parameter])
            mask = torch.zeros(len(whole), 1, 1, dtype=torch.float64)
            mask[int(index)] = 1
            weights[parameter] = weights[parameter] + mask * delta
        else:
            weights[f"{parameter}.{index}.weight"] = weights[f"{parameter}.{index}.weight"] + delta
    found, want = model(**text(4, 12, 0)), functional_call(plain, weights, (), text(4, 12, 0))
    check(found.logits, want.logits, FP64)
    gradients, expected = (torch.autograd.grad(one.loss, cores) for one in (found, want))
    check(gradients, expected, FP64)
    assert sum(bool(gradient.norm() > 0) for gradient in gradients) > len(cores) // 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_each_expert_starts_with_its_own_first_step(kind: str, strategy: str) -> None:
    model = patched(kind)
    batches = [text(4, 12, seed) for seed in range(2)]
    report = lorasb.initialize(model, batches, lr=1e-2, strategy=strategy, progress=False)
    assert report.strategy == strategy
    assert len(slices(model)) == 2 * 2 * 4  # two blocks, two parameters, four experts
    assert f"model.layers.1.{MODELS[kind][1]}.down_proj.3" in slices(model)
    sums = autograd_sums(MODELS[kind][0](), batches)
    for name, layer in slices(model).items():
        parameter, _, index = name.rpartition(".")
        gradient = sums[parameter][int(index)]
        if not gradient.any():  # no token was routed to this expert
            continue
        step = -gradient.sign()
        b, a = layer.lorasb_B["default"].detach(), layer.lorasb_A["default"].detach()
        kept, best = (b.t() @ step @ a.t()).square().sum(), torch.linalg.svdvals(step)[:3].square().sum()
        assert kept > ENERGY * best, name


def test_an_expert_without_tokens_takes_the_subspace_of_its_weight() -> None:
    model = patched("llama4")
    for name, module in model.named_modules():
        if name.endswith("router"):
            with torch.no_grad():
                module.weight.zero_()  # a tie, which goes to the first experts
    with pytest.warns(UserWarning, match=r"experts"):
        report = lorasb.initialize(model, [text(4, 12, 0)], lr=1e-2, progress=False)
    fallbacks = [layer.name for layer in report.layers if layer.fallback]
    assert fallbacks
    assert all("experts" in name for name in fallbacks)
    assert all(layer.is_initialized("default") for layer in slices(model).values())


@pytest.mark.parametrize("kind", MODELS)
def test_merging_saving_and_unloading(kind: str, tmp_path: Path) -> None:
    make: Callable[[], Any] = MODELS[kind][0]
    model = patched(kind, init="kaiming").eval()
    want, base = logits(model), logits(make())
    assert (want - base).abs().max() > 1e-2
    with model.disable_adapter():
        check(logits(model), base, EXACT)
    model.save_pretrained(tmp_path)
    check(logits(peft.PeftModel.from_pretrained(make(), tmp_path).eval()), want, EXACT)
    model.merge_adapter()
    check(logits(model), want, MERGE)
    with model.disable_adapter():
        check(logits(model), base, MERGE)
    model.merge_adapter()
    model.unmerge_adapter()
    check(logits(model), want, MERGE)
    plain = copy.deepcopy(model).merge_and_unload()
    check(logits(plain), want, MERGE)
    assert list(plain.state_dict()) == list(make().state_dict())
    assert [type(m) for m in model.unload().modules()] == [type(m) for m in make().modules()]
    discard(discarded := patched(kind, init="kaiming"), "default")
    assert [type(m) for m in discarded.base_model.model.modules()] == [type(m) for m in make().modules()]


def test_a_second_adapter_opens_further_parameters_and_one_that_fails_leaves_the_first() -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "init": "kaiming"}
    model = lorasb.patch(gpt_oss(), r=3, target_parameters=["mlp.experts.down_proj"], **fields)
    first, further = logits(model), fields | {"target_parameters": targets("mlp.experts")}
    with pytest.raises(ValueError, match="rank 99 is more than layer"):
        model.add_adapter("second", lorasb.LoRASBConfig(r=99, **further | {"target_modules": []}))
    check(logits(model), first, EXACT)
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, **further))
    check(logits(model), first, EXACT)
    model.set_adapter("second")
    assert (logits(model) - first).abs().max() > 1e-2
    model.set_adapter("default")
    model.delete_adapter("second")
    check(logits(model), first, EXACT)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.odd = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def test_a_matrix_without_a_linear_is_adapted_where_it_is() -> None:
    net = nn.Sequential()
    net.bare = Bare()
    model = lorasb.patch(net, r=2, target_modules=[], target_parameters=["bare.weight"], init="kaiming").eval()
    x = torch.randn(3, 8)
    layer: Any = model.base_model.model.bare
    (one,) = layer.slices("weight")
    check(model(x), x @ (net.bare.base_layer.weight + one.get_delta_weight("default")).t(), MERGE)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.bare = Bare()
    with unchanged(net), pytest.raises(TypeError, match=r"expected a matrix .*bare\.odd is \[2, 2, 2, 2\]"):
        lorasb.patch(net, r=2, target_modules=[], target_parameters=["bare.odd"])
    model = patched("gpt-oss", init="kaiming").eval()
    with pytest.raises(ValueError, match=r"merge the adapter \(model\.merge_and_unload\(\)\)"):
        lorasb.export_lora(model, tmp_path)
    batch = text(2, 12, 0)
    batch.pop("labels")
    with pytest.raises(ValueError, match="adapted for all rows at once"):
        model(**batch, adapter_names=["default", "__base__"])


def chained() -> nn.Module:
    net = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), second=nn.Linear(8, 8)))
    net.scale = nn.Parameter(torch.ones(8, 8))
    return net


def test_a_linears_weight_by_name_is_not_adapted_as_a_linear_too() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    model = lorasb.patch(chained(), r=2, init="random", target_parameters=["first.weight"])
    assert list(layers(model, AdaptedLayer)) == ["first.weight.0", "second"]
    before = model(x)
    fill(model, "default", 0)
    after = model(x)
    assert not torch.allclose(before, after)
    model.merge_adapter()
    check(model(x), after, MERGE)
    with pytest.raises(ValueError, match=r"'first' is named by target_modules, and a parameter of it by target_param"):
        lorasb.patch(chained(), r=2, target_modules=["first"], target_parameters=["first.weight"])
    with pytest.raises(ValueError, match=r"top-level module is not supported \(parameter 'scale'\)"):
        lorasb.patch(chained(), r=2, target_modules=["first"], target_parameters=["scale"])


def test_all_linear_leaves_a_router_alone_that_has_a_linears_class() -> None:
    model = lorasb.patch(llama4(), r=3, target_parameters=targets("feed_forward.experts"))
    named = layers(model, AdaptedLayer)
    assert any(n.endswith("q_proj") for n in named)
    assert not any("router" in n for n in named)
    assert torch.isfinite(model(**text(4, 12, 0)).loss)
    with pytest.raises(TypeError, match=r"router' is a Llama4Router, an nn.Linear whose forward gives something else"):
        lorasb.patch(llama4(), r=3, target_modules=["router"])


class Grouped(nn.Linear):
    """Like DeepSeek-V4's: [.., groups, in] to [.., groups, out / groups]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gi,goi->...go", x.unflatten(-2, (-1, 2)), self.weight.unflatten(0, (2, -1)))


def test_all_linear_leaves_a_linear_of_groups_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Grouped(8, 8))
    assert list(layers(lorasb.patch(model, r=2, target_modules="all-linear"), AdaptedLayer)) == ["0"]
