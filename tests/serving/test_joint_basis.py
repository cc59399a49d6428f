"""One basis for several adapters or tasks: energy kept, against plain SVDs in fp64; projected LoRAs; refusals."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from basis_models import a_layer, answer, base, fill, reconfigure, with_basis
from models import batches_for, logits, make, started
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import EXPORT, FP64, MERGE, ORTHONORMAL, RANKS, check
from torch import Tensor, nn

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving.joint_basis import KeptShares, Update, joint_factors, lora_updates


def two() -> PeftModel:
    model = with_basis(adapter_name="ada")
    model.add_adapter("grace", lorasb.LoRASBConfig(r=4, init="kaiming", init_seed=5))
    for seed, name in enumerate(("ada", "grace")):
        fill(model, name, seed)
    return model


def test_a_basis_of_twice_the_rank_keeps_everything() -> None:
    model = two()
    wanted = {name: answer(model, name) for name in ("ada", "grace")}
    shares = lorasb.share_basis(model, ["ada", "grace"], "both", r=8)
    for share in shares.overall.values():
        check(torch.tensor(share), torch.tensor(1.0), RANKS)
    for name, want in wanted.items():
        check(answer(model, name), want, MERGE)
        assert a_layer(model, "both").lorasb_A[name] is a_layer(model, "both").lorasb_A["both"]
    assert not a_layer(model, "both").lorasb_R["both"].any()


def check_projections(shares: KeptShares, model: PeftModel, name: str, former: PeftModel, before: str) -> None:
    """Each R is the projection of the former model's update, and the shares are the energy that it keeps."""
    energies = []
    for layer, module in layers_with(model, name).items():
        b, a = module.lorasb_B[name].double(), module.lorasb_A[name].double()
        check(b.t() @ b, torch.eye(4, dtype=torch.float64), ORTHONORMAL)
        delta = layers_with(former, before)[layer].get_delta_weight(before).double()
        want = b.t() @ delta @ a.t()
        check(module.lorasb_R[name], want, EXPORT)
        energies.append((float(want.square().sum()), float(delta.square().sum())))
        assert abs(energies[-1][0] / energies[-1][1] - shares.by_layer[name][layer]) < 1e-5
    kept, total = map(sum, zip(*energies, strict=True))
    assert abs(kept / total - shares.overall[name]) < 1e-5


def test_each_r_is_the_projection_and_the_shares_are_what_it_keeps() -> None:
    model = two()
    former = copy.deepcopy(model)
    shares = lorasb.share_basis(model, ["ada", "grace"], "both")
    for name in ("ada", "grace"):
        check_projections(shares, model, name, former, name)
        assert 0.2 < shares.overall[name] < 0.95  # the basis has half of the directions of two adapters that share none


@pytest.mark.parametrize("r", [1, 3, 6])
def test_the_joint_factors_keep_no_less_than_either_and_than_one_pass(r: int) -> None:
    g = torch.Generator().manual_seed(r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    updates = [Update.of(normal(20, 6), normal(6, 6), normal(6, 16)) for _ in range(3)]
    dense = [one.left @ one.core @ one.right / one.energy**0.5 for one in updates]

    def kept(b: Tensor, a: Tensor) -> float:
        return sum(float((b.t() @ delta @ a.t()).square().sum()) for delta in dense)

    b, a = joint_factors(updates, r)
    check(b.t() @ b, torch.eye(r, dtype=torch.float64), FP64)
    check(a @ a.t(), torch.eye(r, dtype=torch.float64), FP64)
    one_pass = kept(torch.linalg.svd(torch.cat(dense, 1)).U[:, :r], torch.linalg.svd(torch.cat(dense, 0)).Vh[:r])
    assert kept(b, a) >= one_pass - 1e-12
    for delta in dense:
        u, _, vh = torch.linalg.svd(delta)
        assert kept(b, a) >= kept(u[:, :r], vh[:r]) - 1e-12
    # a stationary point: neither factor can be improved given the other
    best_b = torch.linalg.svd(torch.cat([delta @ a.t() for delta in dense], 1)).U[:, :r]
    assert kept(best_b, a) <= kept(b, a) + 1e-3


def test_updates_of_few_directions_are_completed_to_the_rank() -> None:
    update = Update.of(torch.ones(6, 1), torch.ones(1, 1), torch.ones(1, 5))
    b, a = joint_factors([update, update], 4)
    check(b.t() @ b, torch.eye(4, dtype=torch.float64), FP64)
    check(a @ a.t(), torch.eye(4, dtype=torch.float64), FP64)
    check(update.on(b, a).square().sum(), torch.tensor(update.energy), FP64)


def lora(folder: Path, **options: object) -> Tensor:
    """Save a LoRA with random factors; return its output."""
    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options))
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return logits(model.eval())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"self_attn.(q|k)_proj": 12}}])
def test_a_lora_in_the_basis_is_projected_without_a_loss(tmp_path: Path, options: dict[str, object]) -> None:
    want = lora(tmp_path / "lora", **options)
    model = with_basis(adapter_name="ada")
    for layer, update in lora_updates(tmp_path / "lora").items():
        layers_with(model, "ada")[layer].set_factors("ada", update.left, torch.zeros(4, 4), update.right)
    assert lorasb.project(model, tmp_path / "lora", "mine", basis="ada") < 1e-6
    check(answer(model, "mine"), want, MERGE)


@pytest.mark.parametrize("init", ["lora-xs", "lora-xs-output"])
def test_a_basis_with_sigma_in_a_factor_projects_too(tmp_path: Path, init: str) -> None:
    model = with_basis(init=init)
    plain = get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    for name, layer in layers_with(model, "default").items():
        mine = plain.base_model.model.get_submodule(name)
        g = torch.Generator().manual_seed(len(name))
        mine.lora_A["default"].weight.data = layer.lorasb_A["default"].data.clone()
        mine.lora_B["default"].weight.data = layer.lorasb_B["default"] @ torch.randn(4, 4, generator=g) * 0.1
    plain.save_pretrained(tmp_path)
    want = logits(plain.eval())
    assert lorasb.project(model, tmp_path, "mine") < 1e-6
    check(answer(model, "mine"), want, MERGE)


def test_a_lora_that_would_lose_too_much_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    lora(tmp_path / "lora")
    model = with_basis()
    with pytest.raises(ValueError, match=r"would lose 9\d\.\d% of its energy on the basis 'default', more than 10\.0%"):
        lorasb.project(model, tmp_path / "lora", "mine")
    assert list(model.peft_config) == ["default"]
    lost = lorasb.project(model, tmp_path / "lora", "mine", most_lost=1.0)
    assert 0.9 < lost < 1.0
    assert torch.isfinite(answer(model, "mine")).all()


def test_ranks_are_those_of_whole_names() -> None:
    """`enc.proj` ends in `proj`, too."""
    names = {"proj": nn.Linear(16, 16), "enc": nn.Sequential(OrderedDict(proj=nn.Linear(16, 16)))}
    model = lorasb.patch(nn.Sequential(OrderedDict(names)), r=4, rank_pattern={"^proj": 2}, init="random")
    model.add_adapter("second", lorasb.LoRASBConfig(r=4, rank_pattern={"^proj": 2}, init="random", init_seed=1))
    lorasb.share_basis(model, ["default", "second"], "joint")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="linear")
    for adapter in ("joint", "sum"):
        found = {name: layer.r[adapter] for name, layer in layers_with(model, adapter).items()}
        assert found == {"proj": 2, "enc.proj": 4}


def test_a_basis_of_experts_loads(tmp_path: Path) -> None:
    target = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    model = lorasb.patch(make("mixtral"), r=2, init="kaiming", **target)
    model.add_adapter("other", lorasb.LoRASBConfig(r=2, init="random", **target))
    lorasb.share_basis(model, ["default", "other"], "both")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("mixtral"), tmp_path / "both")
    again.load_adapter(tmp_path / "other", "other")
    check(answer(again, "other"), answer(model, "other"), MERGE)
    alone = PeftModel.from_pretrained(make("mixtral"), tmp_path / "other")
    check(answer(alone, "default"), answer(model, "other"), MERGE)


def test_what_cannot_share_is_refused(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    lora(tmp_path / "head", modules_to_save=["norm"])
    lora(tmp_path / "biased")
    reconfigure(tmp_path / "biased", lora_bias=True)
    for folder, message in (
        ("", r"expected a LoRA adapter with adapter_config\.json"),
        ("ada", r"expected a plain LoRA in .*, got LORASB"),
        ("head", r"linear layers and nothing else in .*norm"),
        ("biased", r"expected a plain LoRA in .*, got LoRA with a bias of B"),
    ):
        with pytest.raises(ValueError, match=message):
            lorasb.project(model, tmp_path / folder, "mine", basis="ada", most_lost=1.0)
    model.add_adapter("new", lorasb.LoRASBConfig(r=4))
    model.add_adapter("user", lorasb.LoRASBConfig(basis="grace"))
    for other, message in (
        ("ada", "expected two adapters or more to share a basis"),
        ("nobody", "'nobody' has 0, 'ada' 14"),
        ("new", "'new' has not been initialized"),
        ("grace", "'grace' is the basis of user, whose"),
    ):
        with pytest.raises(ValueError, match=message):
            lorasb.share_basis(model, ["ada", other], "both")
    assert set(model.peft_config) == {"ada", "grace", "new", "user"}


def test_all_else_of_the_adapters_stays() -> None:
    model = lorasb.patch(make("bert"), r=4, init="kaiming", lora_dropout=0.1, adapter_name="ada")
    model.add_adapter("grace", lorasb.LoRASBConfig(r=4, init="kaiming", init_seed=5, lora_dropout=0.2))
    heads = {n: p for n, p in model.named_parameters() if "modules_to_save.ada" in n}
    assert heads
    for parameter in heads.values():
        parameter.data.fill_(7.0)
    model.set_adapter("ada")
    lorasb.share_basis(model, ["ada", "grace"], "both")
    assert all(bool(p.eq(7.0).all()) for n, p in model.named_parameters() if "modules_to_save.ada" in n)
    assert [a_layer(model, "ada").adapters[name].lora_dropout for name in ("ada", "grace")] == [0.1, 0.2]
    assert model.active_adapters == ["ada"]
    assert model.active_adapter == "ada"


TASKS = {"math": batches_for("llama")[:1], "code": batches_for("llama")[1:2]}


def test_each_task_has_the_projection_of_its_own_start_and_all_train_in_one_batch() -> None:
    model, report = started(batches=TASKS)
    assert set(model.peft_config) == {"math", "code", "default"}
    assert model.active_adapters == ["default"]
    assert not a_layer(model).lorasb_R["default"].any()
    for task, batches in TASKS.items():
        assert all(module.lorasb_A[task] is module.lorasb_A["default"] for module in layers_with(model, task).values())
        check_projections(report.shares, model, task, started(batches=batches)[0], "default")
        assert report.tasks[task].num_samples == len(batches[0]["input_ids"])
    assert "the shared basis keeps\n  math: " in str(report)
    model.base_model.set_adapter(["math", "code"])
    model.train()(**batches_for("llama")[2], adapter_names=["math", "code"]).loss.backward()
    assert all(a_layer(model).lorasb_R[task].grad.any() for task in TASKS)
