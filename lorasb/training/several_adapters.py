"""Training of several adapters on one basis in the same batches, each as if it were trained alone.

A batch's rows belong to adapters by name: `model(**batch, adapter_names=names)` computes all of them in one pass, with
gradients apart. Each adapter's loss is the mean over its own rows, its gradient is clipped by its own norm, and AdamW,
which treats every number by itself, has a parameter group of each. An adapter without rows in a batch makes no step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..constants import BASE_ROW
from ..layers.lookup import layers_with
from ..utils.checks import check_lr

IGNORED = -100  # label of tokens that no loss counts, as in transformers


def adapter_losses(logits: Tensor, labels: Tensor, adapter_names: Sequence[str]) -> dict[str, Tensor]:
    """The mean loss of each adapter over the labeled tokens of its rows, for a language model.

    Their sum's gradient is each adapter's own: R of one depends on no other's rows.

    Args:
        logits: [n, T, V].
        labels: [n, T], -100 where no loss is counted; the logits before a token predict it, as in transformers.
        adapter_names: of the n rows; rows of `__base__` are left out.

    Raises:
        ValueError: not one name for each row, or an adapter without a labeled token.
    """
    if len(adapter_names) != len(labels) or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits [n, T, V], labels [n, T] and n names, got {list(logits.shape)}, {list(labels.shape)} and "
            f"{len(adapter_names)}"
        )
    targets, by_token = labels[:, 1:], token_losses(logits, labels)
    found = {}
    for name in dict.fromkeys(adapter_names):
        if name == BASE_ROW:
            continue
        rows = torch.tensor([i for i, one in enumerate(adapter_names) if one == name], device=labels.device)
        count = (targets[rows] != IGNORED).sum()
        if not count:
            raise ValueError(f"adapter {name!r} has no labeled token in this batch: its labels are all {IGNORED}")
        found[name] = by_token[rows].sum() / count
    return found


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, T - 1]: the loss of each label after the first, 0 where none is counted.

    Args:
        logits: [n, T, V].
        labels: [n, T].
    """
    targets = labels[:, 1:]
    # flat: over a transposed view of the vocabulary torch takes several times as long
    wide = logits[:, :-1].flatten(0, 1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    by_token = functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return by_token.view(targets.shape)


def adapter_parameter_groups(
    model: nn.Module, adapters: Sequence[str], lr: float | Mapping[str, float], **options: Any
) -> list[dict[str, Any]]:
    """A parameter group for each adapter, of its R's, which are set to train; those of others are frozen.

    Args:
        model: a PeftModel whose adapters stand on one basis.
        adapters: to train.
        lr: of all, or by name.
        options: of every group (`weight_decay=0.0`, ...).

    Returns:
        Groups with "params", "lr" and "name", for any optimizer of torch.

    Raises:
        ValueError: an adapter is unknown, or has no learning rate.
    """
    found = []
    for name in adapters:
        layers = layers_with(model, name)
        rate = lr.get(name) if isinstance(lr, Mapping) else lr
        if not layers or rate is None:
            what = "is no adapter of this model" if not layers else "has no learning rate in lr"
            raise ValueError(f"adapter {name!r} {what}")
        check_lr(rate, zero=True)
        found.append(
            {"params": [layer.lorasb_R[name] for layer in layers.values()], "lr": rate, "name": name, **options}
        )
    trained = {id(parameter) for group in found for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if ".lorasb_R." in name:
            parameter.requires_grad_(id(parameter) in trained)
    return found


def clip_by_adapter(groups: Sequence[Mapping[str, Any]], max_norm: float) -> dict[str, float]:
    """Scale each group's gradients down to a norm of its own, in place.

    Args:
        groups: `optimizer.param_groups` of `adapter_parameter_groups`.
        max_norm: of one adapter's gradients together.

    Returns:
        The norms before, of adapters that have gradients.
    """
    norms = {}
    for group in groups:
        if any(parameter.grad is not None for parameter in group["params"]):
            norms[group["name"]] = float(nn.utils.clip_grad_norm_(group["params"], max_norm))
    return norms
