"""What models over other frozen linears share, whatever stores W: their dense twin's results, and W as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from adapters import layers
from gradients import factors
from models import Batch, batches_for
from tolerances import EXACT, EXPORT, MERGE, PROCESS_SUMS, check, check_equal
from torch import Tensor, nn
from trainer_runs import train

import lorasb


def batches(count: int = 3) -> list[Batch]:
    return batches_for("llama", count)


def with_linears(model: Any, make: Callable[[Any], nn.Module]) -> Any:
    """A language model whose blocks' linears are replaced."""
    for name, layer in list(model.model.named_modules()):
        if hasattr(layer, "in_features"):
            model.model.set_submodule(name, make(layer))
    return model


def dense_linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return layer


def check_gradients(model: nn.Module, dense: nn.Module) -> None:
    """Loss and gradients are those of the dense base under the same factors."""
    twin = lorasb.patch(dense, r=4)
    lorasb.initialize(twin, batches(), lr=1e-2, progress=False)
    for layer, other in zip(layers(model).values(), layers(twin).values(), strict=True):
        layer.set_factors("default", other.lorasb_B["default"], other.lorasb_R["default"], other.lorasb_A["default"])
    results = []
    for each in (model, twin):
        loss = each.train()(**batches()[0]).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(results[0]) == 15  # the loss and seven layers of two blocks
    check(*results, PROCESS_SUMS)


def check_training(model: nn.Module) -> None:
    """R alone trains and lowers the loss, where training and evaluation take turns."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {f"base_model.model.{name}.lorasb_R.default" for name in layers(model)}
    optimizer, batch, losses = torch.optim.AdamW(trained.values(), lr=5e-2), batches()[0], []
    for _ in range(6):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(**batch)
            with model.disable_adapter():
                model(**batch)
    assert losses[-1] < losses[0] - 0.1


def check_resuming(make: Callable[[], Any], folder: Path, **init: Any) -> None:
    """A trainer that resumes ends with the bits of one that was not interrupted; `init` is for `InitCallback`."""
    done = []
    for resume in (None, str(folder / "checkpoint-2")):
        callbacks = [lorasb.InitCallback(**init)] if init else []
        done.append(factors(train(make(), folder, callbacks, resume=resume).model))
    check_equal(*done)


def check_files(model: Any, base: nn.Module, dense: nn.Module, folder: Path) -> Tensor:
    """The logits, which a saved adapter gives on the base to the bit, and its plain LoRA on the dense base."""
    want = model(**batches()[0]).logits
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    check(again(**batches()[0]).logits, want, EXACT)
    lorasb.export_lora(model, folder / "lora", quiet=True)
    plain = peft.PeftModel.from_pretrained(dense, folder / "lora").eval()
    check(plain(**batches()[0]).logits, want, EXPORT)
    return want


def check_merging(model: Any) -> None:
    """Merging gives dense layers, and unmerging the base layers themselves."""
    want, bases = model(**batches()[0]).logits, [layer.base_layer for layer in layers(model).values()]
    model.merge_adapter()
    check(model(**batches()[0]).logits, want, MERGE)
    model.unmerge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases
    check(model(**batches()[0]).logits, want, EXACT)
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if hasattr(m, "in_features")} == {nn.Linear}
    check(merged(**batches()[0]).logits, want, MERGE)
