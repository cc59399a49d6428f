"""One adapter per row of a batch: each row's output matches a run with its adapter alone, or the call is refused."""

import pytest
import tolerances
import torch
import transformers
from adapters import layers, two
from models import EXPERTS, FAMILIES, SIZES, batches_for, causal, encoder, generated, opt
from torch import Tensor, nn

import lorasb


def check_rows(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> None:
    """Compare each row with a run of the entire batch under that row's adapter alone."""
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_each_row_gets_its_adapter(family: str) -> None:
    model = two(family)
    check_rows(model, batches_for(family, count=1, rows=4)[0], ["second", "__base__", "default", "second"])
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


def with_two(base: nn.Module, **fields: object) -> nn.Module:
    """A model with two adapters whose random factors change the output clearly."""
    model = lorasb.patch(base, r=4, **fields)
    model.add_adapter("second", lorasb.LoRASBConfig(r=3, **fields))
    g = torch.Generator().manual_seed(5)
    for layer in layers(model).values():
        for name, r in layer.r.items():
            b, a = torch.randn(layer.out_features, r, generator=g), torch.randn(r, layer.in_features, generator=g)
            layer.set_factors(name, b * 0.3, torch.randn(r, r, generator=g) * 0.3, a * 0.3)
    return model.eval()


MODELS = {
    "mixtral": lambda: causal("Mixtral", num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "opt": opt,
    "opt, norm after": lambda: opt(do_layer_norm_before=False),
    # its get_encoder() returns the decoder's stack
    "roberta decoder": lambda: encoder("Roberta", "ForCausalLM", pad_token_id=1, is_decoder=True),
}


@pytest.mark.parametrize(
    ("name", "everything"), [*((name, True) for name in MODELS), ("mixtral", False), ("qwen3_moe", False)]
)
def test_rows_reach_experts_and_flattened_layers(name: str, everything: bool) -> None:
    """Some batches give an expert exactly as many tokens as there are rows."""
    torch.manual_seed(0)
    moe = name in ("mixtral", "qwen3_moe")
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


class Routed(nn.Module):
    """Experts as separate linears: one gets the tokens with a positive first entry, the other the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        y = torch.zeros_like(flat)
        for e, chosen in enumerate((flat[:, 0] > 0, flat[:, 0] <= 0)):
            y[chosen] = self.experts[e](flat[chosen])
        return y.reshape(x.shape)


def test_where_rows_cannot_be_told_nothing_is_guessed() -> None:
    model = with_two(nn.Sequential(Routed()), target_modules="all-linear")
    x = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0], x[:, 1, 0] = 1.0, -1.0  # two tokens for each expert: as many as there are rows
    with pytest.raises(ValueError, match=r"which cannot be mapped to rows of the batch.*model\.set_adapter\(name\)"):
        model(x, adapter_names=["default", "second"])
    model.set_adapter("second")
    tolerances.check(model(x, adapter_names=["second", "second"]), model(x), tolerances.MERGE)


TOKENS_FIRST = {
    "Longformer": (SIZES | {"attention_window": 4, "max_position_embeddings": 64}, ["query", "value"]),
    "XLNet": ({"d_model": 32, "d_inner": 48, "n_layer": 1, "n_head": 2, "vocab_size": 99}, ["layer_1", "layer_2"]),
}


@pytest.mark.parametrize("kind", TOKENS_FIRST)
def test_families_whose_layers_get_tokens_first_are_refused(kind: str) -> None:
    sizes, targets = TOKENS_FIRST[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = with_two(getattr(transformers, f"{kind}ForTokenClassification")(config), target_modules=targets)
    ids = torch.randint(5, 99, (4, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="which cannot be mapped to rows of the batch"):
        model(input_ids=ids, adapter_names=["default", "second"] * 2)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5", "mixtral", "roberta decoder"])
def test_generation_with_an_adapter_for_each_row_is_that_of_each_alone(family: str, beams: int) -> None:
    torch.manual_seed(0)
    fields = {"target_parameters": EXPERTS} if family == "mixtral" else {}
    model = with_two(MODELS[family](), **fields) if family in MODELS else two(family)
    ids = batches_for(family, count=1)[0]["input_ids"]
    mixed = generated(model, ids, num_beams=beams, adapter_names=["second", "default"])
    for i, name in enumerate(("second", "default")):
        model.set_adapter(name)
        assert torch.equal(mixed[i], generated(model, ids, num_beams=beams)[i])


def test_what_rows_cannot_ask_for_is_refused() -> None:
    model = two()
    for names, error, message in (
        (["nobody", "default"], ValueError, r"non-existing adapter\(s\): nobody\. The model has default, second"),
        ("default", TypeError, "expected adapter_names as a list"),
        ([None, "default"], TypeError, "expected adapter_names as a list"),
        (["default"] * 3, ValueError, "same as the number of inputs, but got 3 and 2"),
        (["__base__"], ValueError, "same as the number of inputs, but got 1 and 2"),
    ):
        with pytest.raises(error, match=message):
            model(**batches_for("llama")[0], adapter_names=names)
        assert not any(layer._forward_pre_hooks for layer in layers(model).values())
    compiled = two()
    compiled.base_model.model.model.layers[1].compile()  # rows with names would reuse a graph made without names
    with pytest.raises(ValueError, match=r"'model\.layers\.1' is compiled by itself, which would ignore them"):
        compiled(**batches_for("llama")[0], adapter_names=["default", "second"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model\.unmerge_adapter\(\)"):
        model(**batches_for("llama")[0], adapter_names=["default", "default"])


def test_rows_of_an_adapter_without_its_own_head_use_the_models() -> None:
    model = lorasb.patch(causal("Llama"), r=4, init="random", modules_to_save=["lm_head"])
    model.add_adapter("third", lorasb.LoRASBConfig(r=2, init="random", target_modules=["q_proj"]))
    ids = batches_for("llama")[0]["input_ids"][:1]
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
        alone = []
        for name in ("default", "third"):
            model.set_adapter(name)
            alone.append(model.eval()(input_ids=ids).logits)
        both = model(input_ids=ids.repeat(2, 1), adapter_names=["default", "third"]).logits
    tolerances.check(both, torch.cat(alone), tolerances.MERGE)
