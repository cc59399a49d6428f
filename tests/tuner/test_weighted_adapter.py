"""Weighted sums of adapters: exact if A and B are shared, else the best approximation of a rank, with its error."""

from pathlib import Path

import peft
import pytest
import tolerances
import torch
from adapters import layers, two, unchanged
from models import EXPERTS, batches_for, logits, make, patched
from networks import Net
from torch import Tensor

import lorasb
from lorasb.layers.linear import LoRASBLinear


def update(layer: LoRASBLinear, weights: dict[str, float]) -> Tensor:
    return sum(weight * layer.get_delta_weight(name).double() for name, weight in weights.items())


def check_best(layer: LoRASBLinear, exact: Tensor, reported: float) -> float:
    """Check that the sum is the best of its rank, and the reported error; return that error."""
    singular = torch.linalg.svdvals(exact)
    best = float(singular[layer.r["sum"] :].norm() / singular.norm())
    assert abs(tolerances.error(layer.get_delta_weight("sum"), exact) - best) < tolerances.EXPORT.atol
    assert abs(reported - best) < tolerances.RANKS.atol
    return best


def test_a_file_that_does_not_fit_leaves_a_sum_as_it_was(tmp_path: Path) -> None:
    lorasb.patch(make("llama"), r=8, init="lora-xs").save_pretrained(tmp_path)
    model = two(shared=True)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    model.set_adapter("sum")
    with unchanged(model), pytest.raises(ValueError, match=r"is \[8, 64\] in the adapter file, expected \[4, 64\]"):
        model.load_adapter(tmp_path, "sum")


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_of_linears_and_experts_is_loaded_again(order: int, tmp_path: Path) -> None:
    model = lorasb.patch(make("mixtral"), r=4, init="random", target_modules=["q_proj", "v_proj"])
    model.add_adapter(
        "e", lorasb.LoRASBConfig(r=4, init="random", target_modules=["k_proj"], target_parameters=EXPERTS)
    )
    model.add_weighted_adapter(["default", "e"][::order], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(make("mixtral"), tmp_path / "sum")
    tolerances.check(logits(loaded, "mixtral"), logits(model, "mixtral"), tolerances.EXACT)


@pytest.mark.parametrize("kind", ["auto", "linear"])
def test_adapters_that_share_factors_are_added_exactly(kind: str, tmp_path: Path) -> None:
    model = two(shared=True)
    errors = model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type=kind)
    assert set(errors.values()) == {0.0}
    assert model.active_adapters == ["default"]
    for layer in layers(model).values():
        assert torch.equal(layer.lorasb_A["sum"], layer.lorasb_A["default"])
        want = update(layer, {"default": 0.7, "second": -0.4})
        tolerances.check(layer.get_delta_weight("sum"), want, tolerances.EXPORT)
    model.set_adapter("sum")
    after = logits(model)
    assert model.peft_config["sum"].inference_mode
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "sum").eval()
    tolerances.check(logits(again), after, tolerances.EXACT)


@pytest.mark.parametrize(("kind", "rank"), [("auto", None), ("linear", None), ("svd", 2), ("svd", 5), ("cat", None)])
@pytest.mark.parametrize("order", [1, -1])
def test_others_are_the_best_of_a_rank_and_their_error_is_told(kind: str, rank: int | None, order: int) -> None:
    """Also if the first or the second adapter lacks some layers."""
    model = two(target_modules=("q_proj", "up_proj"))
    errors = model.add_weighted_adapter(["default", "second"][::order], [1.0, 0.5][::order], "sum", kind, rank)
    for name, layer in layers(model).items():
        names = {"default": 1.0} | ({"second": 0.5} if "second" in layer.lorasb_R else {})
        whole = sum(layer.r[n] for n in names)
        assert layer.r["sum"] == (whole if kind == "cat" else min(rank or 4, whole))
        best = check_best(layer, update(layer, names), errors[name])
        assert kind != "cat" or best < tolerances.RANKS.atol


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """Keep a share of the entries, the largest by magnitude, and zero the others; topk breaks ties."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view_as(tensor), tensor, 0.0)


def elected(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """TIES: per entry, the mean of the weighted values whose sign agrees with the unweighted sum."""
    stacked = torch.stack(tensors)
    agree = stacked.sign() == stacked.sum(0).sign()
    total = sum(weight * value * mask for weight, value, mask in zip(weights, tensors, agree, strict=True))
    return total / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_pruning_acts_on_the_cores_of_adapters_that_share_factors(kind: str) -> None:
    model, weights = two(shared=True), [0.7, -0.4]
    errors = model.add_weighted_adapter(["default", "second"], weights, "sum", kind, density=0.5)
    assert set(errors.values()) == {0.0}
    for layer in layers(model).values():
        cores = [trimmed(layer.scaling[n] * layer.lorasb_R[n].double(), 0.5) for n in ("default", "second")]
        linear = sum(weight * core for weight, core in zip(weights, cores, strict=True))
        want = elected(cores, weights) if kind == "ties" else linear
        tolerances.check(layer.scaling["sum"] * layer.lorasb_R["sum"].detach(), want.detach(), tolerances.EXPORT)
        assert torch.equal(layer.lorasb_A["sum"], layer.lorasb_A["default"])


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_pruned_updates_of_w_are_cut_to_a_rank_and_the_error_is_told(kind: str) -> None:
    model, weights = two(target_modules=("q_proj", "up_proj")), [1.0, 0.5]
    errors = model.add_weighted_adapter(["default", "second"], weights, "sum", kind, svd_rank=5, density=0.3)
    for name, layer in layers(model).items():
        names = [n for n in ("default", "second") if n in layer.lorasb_R]
        updates = [trimmed(layer.get_delta_weight(n), 0.3).double() for n in names]
        linear = sum(weight * one for weight, one in zip(weights, updates, strict=False))
        assert layer.r["sum"] == 5
        check_best(layer, elected(updates, weights[: len(names)]) if "ties" in kind else linear, errors[name])


@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"])
@pytest.mark.parametrize("shared", [True, False])
def test_dare_drops_at_random_and_rescales(kind: str, shared: bool) -> None:
    """As in PEFT, by torch's global random state: the same seed gives the same adapter. Density 1 drops nothing."""
    sums = []
    for _ in range(2):
        model = two(shared=shared)
        torch.manual_seed(1)
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", kind, density=0.5)
        with pytest.warns(UserWarning, match="no pruning will be performed"):
            model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "all", kind, 8, density=1.0)
        sums.append([layer.get_delta_weight("sum") for layer in layers(model).values()])
        for layer in layers(model).values():
            exact = update(layer, {"default": 1.0, "second": 1.0})
            if kind.startswith("dare_linear") and layer.r["all"] == 8:
                tolerances.check(layer.get_delta_weight("all"), exact, tolerances.EXPORT)
            assert tolerances.error(layer.get_delta_weight("sum"), exact) > 0.1
    tolerances.check(*sums, tolerances.EXACT)


@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd", "svd", "cat"])
def test_embeddings_and_convolutions_are_added_as_matrices(kind: str) -> None:
    targets = ["embed", "conv", "image", "head"]
    model = lorasb.patch(Net(), r=3, target_modules=targets, init="kaiming")
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, target_modules=targets, init="kaiming", init_seed=1))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", kind, 5, density=0.9)
    for layer in layers(model).values():
        error = tolerances.error(layer.get_delta_weight("sum"), update(layer, {"default": 1.0, "second": 1.0}))
        assert error < (tolerances.EXPORT.atol if kind in ("svd", "cat") else 1.0)


def test_clamped_factors_stay_orthonormal() -> None:
    model = two()
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "svd", svd_clamp=0.9)
    for layer in layers(model).values():
        b, rank = layer.lorasb_B["sum"].detach(), layer.r["sum"]
        tolerances.check(b.t() @ b, torch.eye(rank), tolerances.ORTHONORMAL)


def test_one_adapter_may_leave_layers_out_and_train_modules_which_go_along() -> None:
    model = patched("llama", modules_to_save=["model.norm"], exclude_modules=["v_proj"])
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lorasb_R" not in name}
    assert whole == {"base_model.model.model.norm.modules_to_save.default.weight"}
    model.add_adapter("second", lorasb.LoRASBConfig(r=3))
    lorasb.initialize(model, batches_for("llama")[1:], lr=5e-2, adapter_name="second", progress=False)
    head = model.base_model.model.model.norm
    with torch.no_grad():
        head.modules_to_save["default"].weight += 1
    errors = model.add_weighted_adapter(["second", "default"], [1.0, 1.0], "sum", "svd")
    assert any(name.endswith("v_proj") for name in errors)
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["default"].weight)
    assert head.modules_to_save["sum"].weight is not head.modules_to_save["default"].weight
    model.add_adapter("third", lorasb.LoRASBConfig(r=2, modules_to_save=["model.norm"], init="random"))
    with pytest.raises(ValueError, match=r"found 1 such instance\(s\)\. Adapters 'default', 'third' have some"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "other")


def test_what_cannot_be_combined_is_refused() -> None:
    model, ties = two(shared=True), (["default", "second"], [1.0, 1.0], "sum", "ties")
    first_three = ties[:3]
    for options, message in (
        ({"density": 1.5}, r"ties takes density in \[0, 1\].*got 1.5"),
        ({"density": 0.5, "majority_sign_method": "most"}, "'total' or 'frequency', got 'most'"),
        ({"density": 0.0, "combination_type": "dare_linear"}, r"dare_linear takes density in \(0, 1\].*got 0.0"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*first_three, **{"combination_type": "ties"} | options)
    model = two()
    for arguments, message in (
        ((["default", "second"], [1.0, 1.0], "sum", "svd", -1), "svd_rank must be positive"),
        ((["default", "second"], [1.0], "sum"), "a weight for each adapter"),
        ((["default", "second"], [1.0, float("nan")], "sum"), "expected finite weights"),
        ((["default", "second"], [1.0, 1.0], "a.b"), "expected a name without dots"),
        ((["default", "second"], [1.0, 1.0], "__base__"), "expected a name without dots"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "no layer has an adapter 'nobody'"),
        ((["default", "second"], [1.0, 1.0], "second"), "has an adapter 'second' already"),
        ((["default", "second"], [1.0, 1.0], "sum", "tied"), "combination_type must be one of auto, linear, svd, cat"),
        (ties, "ties takes density in"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.unmerge_adapter()
    model.add_adapter("third", lorasb.LoRASBConfig(r=2))
    with pytest.raises(ValueError, match="'third' has not been initialized"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="has trained rows of an embedding, which cannot be added"):
        patched("llama", trainable_token_indices=[3, 4]).add_weighted_adapter(["default"], [1.0], "sum")
