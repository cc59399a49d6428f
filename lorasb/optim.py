"""Parameter groups for an optimizer of R: `torch.optim.AdamW(lorasb.parameter_groups(model, lr=1e-3))`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers.adapted_layer import AdaptedLayer
from .utils.checks import check_lr


def parameter_groups(
    model: nn.Module, lr: float, *, other_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, as groups for `torch.optim.AdamW(lorasb.parameter_groups(model, lr=1e-3))`.

    R moves inside a fixed subspace and starts at the first step of full fine-tuning, so its learning rate is larger: 10
    to 40 times full fine-tuning's on chain_sum (benchmarks/REPORT.md); the paper uses 1e-4 to 2e-3 (Tables 11 and 12).

    Args:
        model: a patched model.
        lr: learning rate of R.
        other_lr: learning rate of every other parameter that requires a gradient; `lr` by default.
        weight_decay: for parameters with two or more dimensions, except R. Decaying R would pull the update, not a
            weight, toward zero.

    Returns:
        Up to three groups named "lorasb_R", "other" and "other, not decayed", none of them empty.

    Raises:
        ValueError: nothing requires a gradient, or a rate is not in [0, 1e4].
    """
    lr_of_others = lr if other_lr is None else other_lr
    for rate in (lr, lr_of_others):
        check_lr(rate, zero=True)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    core_ids = {id(core) for layer in layers for core in layer.lorasb_R.parameters()}  # parameters compare elementwise
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in core_ids]
    if not trained:
        raise ValueError(
            "no parameter requires a gradient: patch the model (lorasb.patch), or make an adapter active for training "
            "(model.set_adapter(name), PeftModel.from_pretrained(..., is_trainable=True))"
        )
    groups = (
        ("lorasb_R", [p for p in trained if id(p) in core_ids], lr, 0.0),
        ("other", [p for p in others if p.dim() >= 2], lr_of_others, weight_decay),
        ("other, not decayed", [p for p in others if p.dim() < 2], lr_of_others, 0.0),
    )
    names = ("name", "params", "lr", "weight_decay")
    return [dict(zip(names, group, strict=True)) for group in groups if group[1]]
