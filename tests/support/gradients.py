"""Sum gradients by plain autograd and by the library, and compare the sums."""

from collections.abc import Callable

import pytest
import torch
from models import Batch, make
from tolerances import EXACT, Tolerance, check, check_scaled
from torch import Tensor, nn

import lorasb
from lorasb.init import write as fill
from lorasb.init.accumulator import LayerSum
from lorasb.init.factorize import factor

LossFn = Callable[[nn.Module, Batch], Tensor]


def autograd_sums(model: nn.Module | str, batches: list[Batch], loss_fn: LossFn | None = None) -> dict[str, Tensor]:
    """Σ_i ∇W L(x_i) by plain autograd, one sample at a time, of a dense model or a new one of a family; every weight
    requires a gradient."""
    model = make(model) if isinstance(model, str) else model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            sample = {key: value[i : i + 1] for key, value in batch.items()}
            loss = model(**sample).loss if loss_fn is None else loss_fn(model, sample)
            loss.backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lorasb_" in name}


def padded(samples: list[Batch], width: int) -> Batch:
    """One batch of samples of unequal length, padded on the right."""
    rows = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat([nn.functional.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in samples])
        for key, fill in rows.items()
    }


def check_sums(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: Tolerance = EXACT) -> None:
    """Check each ΣG in `got`: the same bits for EXACT, else within a tolerance relative to its largest entry."""
    compare = check if tolerance == EXACT else check_scaled
    compare(list(got.values()), [want[name] for name in got], tolerance)


def library_sums(
    model: nn.Module | str, batches: list[Batch], **options: object
) -> tuple[dict[str, Tensor], lorasb.InitReport]:
    """Return the ΣG of every layer that `initialize` factors, and the report."""
    model = lorasb.patch(make(model), r=3) if isinstance(model, str) else model
    seen: dict[str, Tensor] = {}

    def watched(name: str, gradient: LayerSum, *rest: object) -> object:
        result = factor(name, gradient, *rest)
        seen[name] = gradient.value().clone()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "factor", watched)
        report = lorasb.initialize(model, batches, lr=1e-3, **{"progress": False} | options)
    return {name: seen[name] for name in (layer.name for layer in report.layers)}, report
