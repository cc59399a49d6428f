"""What goes wrong in an initialization is said, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from gradients import factors
from models import Batch, batches_for, logits, make, patched
from peft import PeftModel
from torch import Tensor, nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def first_block(model: nn.Module, batch: Batch) -> Tensor:
    """A loss of the first block's output."""
    inner = model.get_base_model().model
    rotary = inner.rotary_emb(torch.zeros(1, 1, 64), torch.arange(12)[None])
    return inner.layers[0](inner.embed_tokens(batch["input_ids"]), position_embeddings=rotary).mean()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """Initialized; no failure changes it."""
    return patched()


BAD_CALLS = {
    "no labels": (
        lambda: {"batches": [{"input_ids": batch["input_ids"]} for batch in batches_for("llama")]},
        "the model returned no loss .*: add labels to the batches, or pass loss_fn",
    ),
    "only ignored labels": (
        lambda: {"batches": [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches_for("llama")]},
        "no sample has a labeled token: every label of these batches is -100",
    ),
    "lr infinite": (lambda: {"lr": float("inf")}, "init='update' takes batches and lr > 0"),
    "no batches": (lambda: {"batches": None}, "init='update' takes batches and lr > 0"),
    "empty batches": (lambda: {"batches": []}, "expected at least one sample"),
    "no lr": (lambda: {"lr": None}, "init='update' takes batches and lr > 0"),
    "lr zero": (lambda: {"lr": 0.0}, "init='update' takes batches and lr > 0"),
    "update": (lambda: {"update": "lion"}, "update must be one of adamw, sgd, per-sample, got 'lion'"),
    "strategy": (lambda: {"strategy": "fast"}, "strategy must be one of .*, got 'fast'"),
    "too many samples": (lambda: {"num_samples": 99}, "num_samples=99, but the batches hold 6 samples"),
    "no samples": (lambda: {"num_samples": 0}, "expected num_samples >= 1, got 0"),
    "adapter": (lambda: {"adapter_name": "other"}, "no layer has an adapter 'other': the model has default"),
    "loss without a graph": (lambda: {"loss_fn": lambda m, b: torch.ones(())}, "does not depend on any adapted layer"),
    "loss per sample": (
        lambda: {"loss_fn": lambda m, b: m(**b).logits[:, 0, 0]},
        r"expected one loss, got a tensor \[2\]",
    ),
    "layers not reached": (
        lambda: {"loss_fn": first_block},
        "layer 'model.layers.1.self_attn.q_proj' was never reached",
    ),
    "a gradient of zero": (
        lambda: {"loss_fn": lambda m, b: 0.0 * m(**b).logits.sum()},
        "is zero: the loss does not depend on it",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_change_nothing(name: str, model: PeftModel) -> None:
    change, message = BAD_CALLS[name]
    before, answer, modes = factors(model), logits(model), [m.training for m in model.modules()]
    provenance = copy.deepcopy(model.peft_config["default"].init_provenance)
    with pytest.raises(ValueError, match=message):
        lorasb.initialize(model, **{"batches": batches_for("llama"), "lr": 1e-3, "progress": False} | change())
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert torch.equal(logits(model), answer)
    assert [m.training for m in model.modules()] == modes
    assert model.peft_config["default"].init_provenance == provenance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, model: PeftModel) -> None:
    before = factors(model)

    def loss_fn(inner: nn.Module, batch: Batch) -> Tensor:
        values = inner(**batch).logits
        values.register_hook(lambda g: g * value)
        return values.square().mean()

    with pytest.raises(ValueError, match=r"the gradient of layer 'model\.layers\..*' has NaN or Inf entries"):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, loss_fn=loss_fn, progress=False)
    assert all(torch.equal(value_, before[key]) for key, value_ in factors(model).items())


def test_an_interrupted_initialization_changes_nothing(model: PeftModel) -> None:
    before, flags = factors(model), [p.requires_grad for p in model.parameters()]

    def stream() -> Iterator[Batch]:
        yield batches_for("llama")[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorasb.initialize(model, stream(), lr=1e-3, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, LoRASBLinear))


def test_merged_or_unpatched_models_are_refused() -> None:
    model = patched()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected unmerged weights.*model\.unmerge_adapter\(\)"):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3)
    with pytest.raises(ValueError, match=r"call model = lorasb\.patch\(model\) first"):
        lorasb.initialize(make("llama"), batches_for("llama"), lr=1e-3)
