"""Embeddings under adapters: rows looked up in A, tied heads and shared weights, positions, sparse gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import opt
from models import llama, logits, make, text
from tolerances import EXACT, EXPORT, MERGE, check
from torch import Tensor, nn

import lorasb
from lorasb.layers.weight_adapter import LoRASBEmbedding


def test_an_embedding_of_positions_looks_up_what_it_computes() -> None:
    """OPT's takes a mask and looks up counts of its ones: the adapter has to follow its forward."""
    torch.manual_seed(0)
    model = lorasb.patch(opt(), r=3, target_modules=["embed_positions"], init="kaiming")
    want = logits(model.eval())
    plain = model.merge_and_unload()
    check(logits(plain), want, MERGE)


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
    """T5 looks tokens up in its stacks' embeddings, which share the weight of `shared`: an adapter there does nothing."""
    with pytest.raises(ValueError, match=r"'shared' shares its weight with the embedding '\w+\.embed_tokens'"):
        lorasb.patch(make("t5"), r=3, target_modules=["shared"], init="random")


def test_sparse_gradients_and_ids_by_name() -> None:
    net = nn.Sequential()
    torch.manual_seed(0)
    net.embed = nn.Embedding(12, 6, sparse=True)
    model = lorasb.patch(net, r=2, target_modules=["embed"])
    layer: Any = model.base_model.model.embed
    ids = torch.arange(8).view(2, 4)
    lorasb.initialize(
        model, [{"x": ids}], lr=1e-2, progress=False, loss_fn=lambda m, batch: m(batch["x"]).square().mean()
    )
    mixed = layer(input=ids, adapter_names=["default", "__base__"])
    check(mixed[0], layer(ids)[0], EXPORT)
    check(mixed[1], layer.base_layer(ids)[1], EXPORT)


def test_a_scaled_embedding_scales_its_adapter() -> None:
    """Gemma's embeddings multiply what they look up."""

    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    net = nn.Sequential()
    net.embed = Scaled(10, 6)
    model = lorasb.patch(net, r=2, target_modules=["embed"], init="kaiming").eval()
    layer: Any = model.base_model.model.embed
    ids = torch.arange(10)
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    check(layer(ids), 4.0 * merged, EXPORT)


def test_a_tied_head_keeps_its_weight_when_the_embedding_is_merged() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's, on principle
        model = lorasb.patch(llama(), r=4, target_modules=["embed_tokens", "q_proj"], init="kaiming").eval()
    base: Any = model.base_model.model
    head, want = base.lm_head.weight, logits(model)
    assert isinstance(base.model.embed_tokens, LoRASBEmbedding)
    before = head.detach().clone()
    with pytest.warns(UserWarning, match="tied_target_modules"):  # PEFT's merges would change the head
        model.merge_adapter()
    check(logits(model), want, MERGE)
    check(head.detach(), before, EXACT)
    model.unmerge_adapter()
    assert base.model.embed_tokens.base_layer.weight is head
    with pytest.raises(ValueError, match="'lm_head' shares its weight with the input embedding"):
        lorasb.patch(llama(), r=4, target_modules=["lm_head"])


def test_an_embedding_is_initialized_in_a_language_model() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = lorasb.patch(llama(), r=4, target_modules=["embed_tokens", "q_proj"])
    lorasb.initialize(model, [text(2, 12, seed) for seed in range(2)], lr=1e-2, progress=False)
    layer: Any = model.base_model.model.model.embed_tokens
    seen = torch.cat([text(2, 12, seed)["input_ids"].flatten() for seed in range(2)]).unique()
    unseen = [i for i in range(99) if i not in seen]
    assert layer.get_delta_weight("default")[unseen].abs().max() < 1e-6 * layer.get_delta_weight("default").abs().max()
    model.train()(**text(2, 12, 0)).loss.backward()
