"""Experts in 3-D parameters: opened into linears and closed again, each initialized from the tokens routed to it."""

import copy
from pathlib import Path

import pytest
import tolerances
import torch
from adapters import unchanged
from basis_models import reconfigure
from gradients import autograd_sums
from models import EXPERTS, batches_for, causal, logits, make
from peft import PeftModel
from torch import Tensor, nn

import lorasb
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with
from lorasb.layers.unfused_experts import OpenExperts, close, open_targets


def expert_layers(model: nn.Module) -> dict[str, LoRASBLinear]:
    return {name: layer for name, layer in layers_with(model, "default").items() if ".experts." in name}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_opening_shares_the_memory_and_closing_gives_the_same_module_back(family: str) -> None:
    model = make(family)
    before, modules, state = logits(model, family), dict(model.named_modules()), copy.deepcopy(model.state_dict())
    whole = model.get_submodule("model.layers.0.mlp.experts")
    assert len(open_targets(model, EXPERTS)) == 4
    opened = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(opened, OpenExperts)
    assert opened.gate_up_proj[2].weight.data_ptr() == whole.gate_up_proj[2].data_ptr()
    tolerances.check(logits(model, family), before, tolerances.MERGE)
    close(model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_moved_experts_are_closed_with_the_weights_as_they_are() -> None:
    model = make("mixtral")
    state = copy.deepcopy(model.state_dict())
    open_targets(model, EXPERTS)
    model.to(torch.float64)
    assert model.get_submodule("model.layers.0.mlp.experts")._fused[0].gate_up_proj is None
    close(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value.float(), state[name])


def test_each_experts_factors_come_from_the_tokens_routed_to_it() -> None:
    """Compared with autograd on the 3-D parameters of transformers' own model."""
    family, batches = "mixtral", batches_for("mixtral")
    sums = autograd_sums(family, batches)
    model = lorasb.patch(make(family), r=32, target_parameters=EXPERTS)
    report = lorasb.initialize(model, batches, lr=2e-2, progress=False)
    energies = {layer.name: layer.energy_sign for layer in report.layers}
    layers = expert_layers(model)
    assert len(layers) == 2 * 2 * 4
    for name, layer in layers.items():
        parameter, _, expert = name.rpartition(".")
        sign = sums[parameter][int(expert)].sign().double()
        u, s, vt = torch.linalg.svd(sign)
        want = (u[:, :32] * s[:32]) @ vt[:32] * -2e-2
        tolerances.check_scaled(layer.get_delta_weight("default"), want, tolerances.FACTORS)
        assert energies[name] == pytest.approx(float((s[:32] ** 2).sum() / (s**2).sum()), rel=1e-3)


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_experts_whose_tokens_have_no_loss_start_from_their_weight(strategy: str) -> None:
    """In the last block, prompt tokens have zero gradient, and so do experts that get no other tokens."""
    model = lorasb.patch(make("qwen3_moe"), r=4, target_parameters=EXPERTS)
    model.base_model.model.model.layers[-1].mlp.gate.register_forward_hook(_prompts_to_the_last)
    batches = [batch | {"labels": batch["labels"].clone()} for batch in batches_for("qwen3_moe")]
    for batch in batches:
        batch["labels"][:, :-2] = -100
    with pytest.warns(UserWarning, match="not reached by these samples"):
        report = lorasb.initialize(model, batches, lr=2e-2, strategy=strategy, progress=False)
    last = {name for name in expert_layers(model) if name.startswith("model.layers.1.") and name.endswith(".3")}
    assert {layer.name for layer in report.layers if layer.fallback} >= last


def _prompts_to_the_last(_: nn.Module, __: object, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Route all tokens but the last three of each row to expert 3 twice, and those three to the first two experts."""
    scores, weights, chosen = out
    rows = torch.full_like(chosen, 3)
    per_row = len(rows) // 2  # two rows per batch
    for row in range(2):
        rows[(row + 1) * per_row - 3 : (row + 1) * per_row] = torch.tensor([0, 1])
    return scores, weights, rows


def test_passes_whose_experts_have_no_token_are_no_error() -> None:
    """However small the passes are, initialization finds the same layers."""
    ids = torch.full((2, 6), 7)
    batch, found = {"input_ids": ids, "labels": ids}, []
    for budget in (None, 2e5):
        model = lorasb.patch(make("mixtral"), r=4, target_parameters=EXPERTS)
        options = {"strategy": "accumulate", "memory_budget": budget, "progress": False}
        with pytest.warns(UserWarning, match="not reached by these samples.*: then name them in exclude_modules"):
            report = lorasb.initialize(model, [batch], lr=2e-2, **options)
        found.append([(layer.name, layer.fallback) for layer in report.layers])
    assert sorted(found[0]) == sorted(found[1])


def test_a_second_adapter_finds_the_experts_open_and_deleting_both_leaves_them() -> None:
    model = lorasb.patch(make("mixtral"), r=4, target_parameters=EXPERTS)
    before = logits(make("mixtral"), "mixtral")
    model.add_adapter("other", lorasb.LoRASBConfig(r=3, target_parameters=EXPERTS, target_modules=[]))
    assert all(set(layer.lorasb_R) == {"default", "other"} for layer in expert_layers(model).values())
    model.add_adapter("dense", lorasb.LoRASBConfig(r=3))
    assert not any(".experts." in name for name in layers_with(model, "dense"))
    with model.disable_adapter():
        tolerances.check(logits(model, "mixtral"), before, tolerances.MERGE)
    plain = model.unload()
    assert type(plain.get_submodule("model.layers.0.mlp.experts")).__name__ == "MixtralExperts"
    assert torch.equal(logits(plain, "mixtral"), before)


def test_families_that_compute_like_mixtral_are_opened() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    base = causal("Qwen2Moe", shared_expert_intermediate_size=32, **sizes)
    model = lorasb.patch(base, r=4, exclude_modules=["shared_expert_gate"], target_parameters=EXPERTS)
    assert len(expert_layers(model)) == 16


def test_the_report_says_what_is_left_alone() -> None:
    def report_of(family: str, **fields: object) -> lorasb.InitReport:
        model = lorasb.patch(make(family), r=4, **fields)
        return lorasb.initialize(model, batches_for(family), lr=2e-2, progress=False)

    report = report_of("mixtral")
    assert any("routers (model.layers.0.mlp.gate" in line for line in report.left)
    assert any("3-D experts (model.layers.0.mlp.experts, ...): target_parameters" in line for line in report.left)
    report = report_of("mixtral", target_parameters=EXPERTS)
    assert not any("target_parameters" in line for line in report.left)
    report = report_of("llama")
    assert report.left == ["lm_head: shares its weight with the input embedding"]
    assert "left alone: lm_head" in str(report)


def names_of(model: nn.Module) -> set[str]:
    return {name.rpartition(".experts.")[2].partition(".")[0] for name in expert_layers(model)}


@pytest.mark.parametrize(
    ("targets", "opened"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
        (["w1", "w2", "w3"], {"gate_up_proj", "down_proj"}),
        (r".*\.(q_proj|gate_proj|up_proj)", {"gate_up_proj"}),
        (["q_proj"], set()),
    ],
)
def test_target_modules_may_name_experts(targets: list[str] | str, opened: set[str], tmp_path: Path) -> None:
    model = lorasb.patch(make("qwen3_moe"), r=3, target_modules=targets, init="random")
    assert names_of(model) == opened
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("qwen3_moe"), tmp_path)
    assert expert_layers(again).keys() == expert_layers(model).keys()


def test_other_names_and_half_of_a_fused_parameter_are_refused_and_the_model_stays() -> None:
    model = make("qwen3_moe")
    for fields, message in (
        ({"target_parameters": ["experts.down_proj", "experts.up_proj"]}, r"no parameter is called experts\.up_proj"),
        ({"target_parameters": "experts.down_proj"}, r"put it into \[\.\.\.\]"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj without also targeting gate_proj because they are fused"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            lorasb.patch(model, r=3, **fields)
    without = lorasb.patch(model, r=3, target_modules=["q_proj", "up_proj"], exclude_modules=r".*experts.*")
    assert not names_of(without)


def test_an_older_file_whose_names_match_experts_adapts_what_it_has(tmp_path: Path) -> None:
    """Names of linears did not match experts before: the adapter has only the layers that were saved."""
    lorasb.patch(make("qwen3_moe"), r=3, target_modules=["q_proj"], init="random").save_pretrained(tmp_path)
    reconfigure(tmp_path, target_modules=["q_proj", "gate_proj", "up_proj"])
    again = PeftModel.from_pretrained(make("qwen3_moe"), tmp_path)
    assert layers_with(again, "default")
    assert not expert_layers(again)


def test_a_load_without_memory_for_factors_leaves_the_experts_their_weights(tmp_path: Path) -> None:
    """With `low_cpu_mem_usage`, PEFT registers parameters on the meta device."""
    model = lorasb.patch(make("mixtral"), r=4, init="random", target_modules=["q_proj"], target_parameters=EXPERTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("mixtral"), tmp_path, low_cpu_mem_usage=True)
    tolerances.check(logits(loaded, "mixtral"), logits(model, "mixtral"), tolerances.EXACT)
    state = make("mixtral").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.unload().state_dict().items())
