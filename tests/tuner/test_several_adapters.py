"""Several adapters at once: one for each row of a batch, and weighted sums of them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tolerances
import torch
import transformers
from families import EXPERTS, SIZES, causal, opt
from models import batches_for, logits, make, patched
from torch import Tensor, nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def two(family: str = "llama", shared: bool = False, **fields: object) -> nn.Module:
    """A model with two adapters that do different things; `shared`: on the same A and B."""
    model = patched(family)
    model.add_adapter("second", lorasb.LoRASBConfig(r=4 if shared else 3, **fields))
    if shared:
        for layer in layers(model).values():
            core = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.05
            layer.set_factors("second", layer.lorasb_B["default"], core, layer.lorasb_A["default"])
    else:
        lorasb.initialize(model, batches_for(family)[1:], lr=5e-2, adapter_name="second", progress=False)
    return model.eval()


def layers(model: nn.Module) -> dict[str, LoRASBLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRASBLinear)}


def by_row(model: nn.Module, names: list[str], family: str = "llama") -> Tensor:
    batch = batches_for(family, count=1, rows=len(names))[0]
    with torch.no_grad():
        return model(**batch, adapter_names=names).logits


def alone(model: nn.Module, name: str, rows: int, family: str = "llama") -> Tensor:
    batch = batches_for(family, count=1, rows=rows)[0]
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(**batch).logits
        model.set_adapter(name)
        return model(**batch).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_each_row_gets_its_adapter(family: str) -> None:
    model, names = two(family), ["second", "__base__", "default", "second"]
    mixed = by_row(model, names, family)
    for i, name in enumerate(names):
        tolerances.check(mixed[i], alone(model, name, len(names), family)[i], tolerances.MERGE)
    assert (mixed[0] - alone(model, "__base__", len(names), family)[0]).abs().max() > 1e-3
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


def with_two(base: nn.Module, **fields: object) -> nn.Module:
    """A model with two adapters of random factors, whose effects are plain to see."""
    model = lorasb.patch(base, r=4, **fields)
    model.add_adapter("second", lorasb.LoRASBConfig(r=3, **fields))
    g = torch.Generator().manual_seed(5)
    for layer in layers(model).values():
        for name, r in layer.r.items():
            b, a = torch.randn(layer.out_features, r, generator=g), torch.randn(r, layer.in_features, generator=g)
            layer.set_factors(name, b * 0.3, torch.randn(r, r, generator=g) * 0.3, a * 0.3)
    return model.eval()


def check_rows(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> None:
    """Each row against a run of the whole batch with that row's adapter alone."""
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    want = model(**batch).logits
            else:
                model.set_adapter(name)
                want = model(**batch).logits
            tolerances.check(mixed[i], want[i], tolerances.MERGE)
        with model.disable_adapter():
            assert (mixed[0] - model(**batch).logits[0]).abs().max() > 1e-3


MODELS = {
    "mixtral": lambda: causal("Mixtral", num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": lambda: causal(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    ),
    "opt": opt,
    "opt, norm after": lambda: opt(do_layer_norm_before=False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("everything", [True, False])
def test_rows_reach_experts_and_flattened_layers(name: str, everything: bool) -> None:
    """Over batches in which the number of tokens an expert gets is that of the rows, among others."""
    torch.manual_seed(0)
    moe = not name.startswith("opt")
    fields: dict[str, object] = {"target_parameters": EXPERTS if everything else EXPERTS[:1]} if moe else {}
    model = with_two(MODELS[name](), **fields)
    for seed in range(12):
        for rows, tokens in ((2, 2), (2, 1), (4, 4), (3, 5)):
            g = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, 99, (rows, tokens), generator=g)
            names = ["second", "default", "__base__", "second"][:rows]
            check_rows(model, {"input_ids": ids}, names)
            if not everything or seed > 2:
                break


def test_generation_over_experts_with_an_adapter_for_each_row() -> None:
    torch.manual_seed(0)
    model = with_two(MODELS["mixtral"](), target_parameters=EXPERTS)
    ids = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    options["attention_mask"] = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, adapter_names=["second", "default"], **options)
    for i, name in enumerate(("second", "default")):
        model.set_adapter(name)
        assert torch.equal(mixed[i], model.generate(input_ids=ids, **options)[i])


class Routed(nn.Module):
    """Experts as linears of their own, which get the tokens whose first entry is positive, or the others."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        y = torch.zeros_like(flat)
        for e, chosen in enumerate((flat[:, 0] > 0, flat[:, 0] <= 0)):
            y[chosen] = self.experts[e](flat[chosen])
        return y.reshape(x.shape)


class Turned(nn.Module):
    """A layer that gets [T, B, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", [Routed, Turned])
def test_where_rows_cannot_be_told_nothing_is_guessed(kind: type[nn.Module]) -> None:
    model = with_two(Around(kind()), target_modules="all-linear")
    x = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0], x[:, 1, 0] = 1.0, -1.0  # two tokens for each expert: as many as there are rows
    with pytest.raises(ValueError, match=r"rows these belong to cannot be told.*model\.set_adapter\(name\)"):
        model(x, adapter_names=["default", "second"])
    model.set_adapter("second")
    tolerances.check(model(x, adapter_names=["second", "second"]), model(x), tolerances.MERGE)


@pytest.mark.parametrize("kind", ["Longformer", "XLNet"])
def test_families_whose_layers_get_tokens_first(kind: str) -> None:
    if kind == "Longformer":
        config = transformers.LongformerConfig(
            attention_window=4, max_position_embeddings=64, **SIZES | {"hidden_size": 32}
        )
    else:
        config = transformers.XLNetConfig(d_model=32, d_inner=48, n_layer=1, n_head=2, vocab_size=99)
    base = getattr(transformers, f"{kind}ForTokenClassification")(config)
    targets = ["query", "value"] if kind == "Longformer" else ["layer_1", "layer_2"]
    model = with_two(base, target_modules=targets)
    ids = torch.randint(5, 99, (4, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="rows these belong to cannot be told"):
        model(input_ids=ids, adapter_names=["default", "second"] * 2)


def test_rows_over_four_bits() -> None:
    model = lorasb.patch(lorasb.quantize(make("llama")), r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    mixed = by_row(model.eval(), ["default", "__base__"])
    for i, name in enumerate(("default", "__base__")):
        tolerances.check(mixed[i], alone(model, name, 2)[i], tolerances.MERGE)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_with_an_adapter_for_each_row(family: str, beams: int) -> None:
    model, ids = two(family), batches_for(family, count=1)[0]["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    mask = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["second", "default"], **options)
    for i, name in enumerate(("second", "default")):
        model.set_adapter(name)
        assert torch.equal(mixed[i], model.generate(input_ids=ids, attention_mask=mask, **options)[i])


def test_what_rows_cannot_ask_for() -> None:
    model = two()
    for names, error, message in (
        (["nobody", "default"], ValueError, "no layer has an adapter 'nobody'"),
        ("default", TypeError, "expected adapter_names as a list"),
        (["default"] * 3, ValueError, "expected adapter_names for each of 2 rows, got 3"),
    ):
        with pytest.raises(error, match=message):
            model(**batches_for("llama")[0], adapter_names=names)
        assert not any(layer._forward_pre_hooks for layer in layers(model).values())
    with pytest.raises(ValueError, match=r"for evaluation: call model\.eval\(\)"):
        model.train()(**batches_for("llama")[0], adapter_names=["default", "default"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="need unmerged weights"):
        model(**batches_for("llama")[0], adapter_names=["default", "default"])


def update(layer: LoRASBLinear, weights: dict[str, float]) -> Tensor:
    return sum(weight * layer.get_delta_weight(name).double() for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["auto", "linear"])
def test_adapters_that_share_factors_are_added_exactly(kind: str, tmp_path: Path) -> None:
    model = two(shared=True)
    errors = model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type=kind)
    assert set(errors.values()) == {0.0}
    assert model.active_adapters == ["default"]
    for layer in layers(model).values():
        assert torch.equal(layer.lorasb_A["sum"], layer.lorasb_A["default"])
        tolerances.check(
            layer.get_delta_weight("sum"), update(layer, {"default": 0.7, "second": -0.4}), tolerances.EXPORT
        )
    model.set_adapter("sum")
    after = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "sum").eval()
    tolerances.check(logits(again), after, tolerances.EXACT)


@pytest.mark.parametrize(("kind", "rank"), [("auto", None), ("svd", 2), ("svd", 5), ("cat", None)])
def test_others_by_the_best_of_a_rank(kind: str, rank: int | None) -> None:
    model = two(target_modules=["q_proj", "up_proj"])
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum", kind, rank)
    for name, layer in layers(model).items():
        names = {"default": 1.0} | ({"second": 0.5} if "second" in layer.lorasb_R else {})
        exact = update(layer, names)
        singular = torch.linalg.svdvals(exact)
        kept = layer.r["sum"]
        assert kept == (
            sum(layer.r[n] for n in names) if kind == "cat" else min(rank or 4, sum(layer.r[n] for n in names))
        )
        best = float(singular[kept:].norm() / singular.norm())
        found = float((layer.get_delta_weight("sum").double() - exact).norm() / exact.norm())
        assert abs(errors[name.removeprefix("base_model.model.")] - best) < tolerances.RANKS.atol
        assert abs(found - best) < tolerances.EXPORT.atol
        if kind == "cat":
            assert best < tolerances.RANKS.atol


def test_a_first_adapter_that_leaves_layers_out() -> None:
    model = patched("llama", exclude_modules=["v_proj"])
    model.add_adapter("second", lorasb.LoRASBConfig(r=3))
    lorasb.initialize(model, batches_for("llama")[1:], lr=5e-2, adapter_name="second", progress=False)
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "cat")
    assert any(name.endswith("v_proj") for name in errors)
    for layer in layers(model).values():
        names = {name: 1.0 for name in ("default", "second") if name in layer.lorasb_R}
        tolerances.check(layer.get_delta_weight("sum"), update(layer, names), tolerances.EXPORT)


def test_a_merged_quantized_base_takes_what_it_took_before() -> None:
    model = lorasb.patch(lorasb.quantize(make("llama", dtype=torch.bfloat16)), r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    layer, x = next(iter(layers(model).values())), torch.randn(3, 64)
    before = layer(x)
    model.merge_adapter()
    assert layer(x).dtype == before.dtype == torch.float32
    tolerances.check(layer(x) / before.abs().max(), before / before.abs().max(), tolerances.HALF_FEW)


def test_what_cannot_be_combined() -> None:
    model = two()
    with pytest.raises(ValueError, match="svd_rank must be positive"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "svd", -1)
    for arguments, message in (
        ((["default", "second"], [1.0, 1.0], "sum", "linear"), "do not share A and B"),
        ((["default", "second"], [1.0], "sum"), "a weight for each adapter"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "no layer has an adapter 'nobody'"),
        ((["default", "second"], [1.0, 1.0], "second"), "has an adapter 'second' already"),
        ((["default", "second"], [1.0, 1.0], "sum", "ties"), "combination_type must be one of auto, linear, svd, cat"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert set(model.peft_config) == {"default", "second"}
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.unmerge_adapter()
    model.add_adapter("third", lorasb.LoRASBConfig(r=2))
    with pytest.raises(ValueError, match="'third' has not been initialized"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum")
