"""The loss of initialization: each sample's own mean, summed, however the samples are batched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sampling import batch_size, take_rows

LossFn = Callable[[nn.Module, Mapping[str, Any]], Tensor]
AGREES = 1e-5  # a model's own loss and ours, recomputed in fp32 from its logits
AGREES_IN_16_BITS = 8e-3  # the same where the model rounds its loss to 16 bits
IGNORED = -100


def backward_over_samples(model: nn.Module, batch: dict[str, Any], loss_fn: LossFn | None) -> float:
    """Backward through Σ_i L(x_i) of a batch, with L(x_i) the mean over sample i's own labeled tokens.

    A model's own loss is a mean over all tokens of the batch, which weighs long samples more. The gradient at the
    logits is rescaled sample by sample where that mean can be recognized; where it cannot, samples go one by one.
    Samples without a labeled token have no loss and count nothing.
    With `loss_fn`, the caller's loss counts as it is, times the batch's samples.

    Returns:
        The summed loss.

    Raises:
        ValueError: no loss (labels are missing), or a loss that is not finite or depends on nothing.
    """
    rows = batch_size(batch)
    if loss_fn is not None:
        loss = _checked(loss_fn(model, batch), batch) * rows
        loss.backward()
        return float(loss.detach())
    if unlabeled(batch):
        return 0.0
    outputs = model(**batch)
    if _first_label_only(batch, _field(outputs, "loss")):
        return 0.0
    loss, logits = _checked(_field(outputs, "loss"), batch), _field(outputs, "logits")
    if rows == 1:
        del outputs, logits  # the graph does not need them: a large vocabulary's logits are most of the memory here
        loss.backward()
        return float(loss.detach())
    weights = _weights(loss, logits, batch) if _feeds(logits, loss) else None
    if weights is None:
        del outputs, loss, logits
        return sum(backward_over_samples(model, take_rows(batch, torch.tensor([i])), None) for i in range(rows))
    scale, total = weights
    logits.register_hook(lambda g: (g * scale.view(-1, *(1,) * (g.dim() - 1))).to(g.dtype))
    del outputs, logits
    loss.backward()
    return total


def labeled_rows(batch: Mapping[str, Any]) -> int:
    """Samples that have a label."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return batch_size(batch)
    return int((labels != IGNORED).flatten(1).any(1).sum()) if labels.dim() > 1 else int((labels != IGNORED).sum())


def _first_label_only(batch: Mapping[str, Any], loss: Any) -> bool:
    """Whether a causal model has nothing to predict: no label after the first place, and a mean over nothing."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 2 or labels.shape[1] < 2:
        return False
    if not isinstance(loss, Tensor):
        return False
    return bool((labels[:, 1:] == IGNORED).all()) and bool(loss.detach().isnan().all())


def unlabeled(batch: Mapping[str, Any]) -> bool:
    """Whether every label of a batch is ignored: such samples have no loss, and a mean over nothing is NaN."""
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all())


def _feeds(logits: Any, loss: Tensor) -> bool:
    """Whether the loss was computed from these very logits; accelerate's wrappers return copies."""
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        return False
    return torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0] is not None


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _checked(loss: Any, batch: Mapping[str, Any]) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned no loss for a batch with {', '.join(sorted(batch))}: add labels to the batches, or "
            "pass loss_fn=lambda model, batch: ..."
        )
    if loss.numel() != 1:
        raise ValueError(f"expected one loss, got a tensor {list(loss.shape)}: reduce it to its mean")
    if not torch.isfinite(loss.detach()).all():
        raise ValueError(f"the loss of an initialization batch is {float(loss.detach())}: check the data and the dtype")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any adapted layer: nothing to initialize from")
    return loss


@torch.no_grad()
def _weights(loss: Tensor, logits: Any, batch: Mapping[str, Any]) -> tuple[Tensor, float] | None:
    """Per sample, what turns the batch's mean into its own; and Σ_i L(x_i). None where the loss is not understood."""
    labels = batch.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.shape[0] != labels.shape[0]:
        return None
    for sums, counts in _candidates(logits.float(), labels):
        total, some = counts.sum(), counts.clamp(min=1)
        if _close(sums.sum() / total, loss):
            return total / some, float((sums / some).sum())
    return None


def _candidates(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(Σ of losses, number of labeled places) per sample, for each reading of the labels that the shapes allow."""
    found = []
    if labels.dtype == torch.long and labels.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == labels.shape:
        found.append(_cross_entropy(logits[:, :-1], labels[:, 1:]))  # causal: predict the next token
        found.append(_cross_entropy(logits, labels))  # masked or encoder-decoder: predict the token in place
    elif labels.dtype == torch.long and labels.dim() == 1 and logits.dim() == 2:
        found.append(_cross_entropy(logits[:, None], labels[:, None]))
    elif labels.is_floating_point():
        values = logits.reshape(logits.shape[0], -1)
        targets = labels.reshape(labels.shape[0], -1).float()
        if values.shape == targets.shape:
            places = torch.full((len(values),), float(values.shape[1]), device=values.device)
            found.append(((values - targets).square().sum(1), places))
            found.append((F.binary_cross_entropy_with_logits(values, targets, reduction="none").sum(1), places))
    return found


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Over [samples, places, classes]; flat, as a sum over a strided vocabulary is off by more than a loss may be."""
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.to(logits.device)
    losses = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none").view(labels.shape)
    return losses.sum(1), (labels != IGNORED).sum(1).to(losses.device, losses.dtype)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    share = AGREES if theirs.dtype in (torch.float32, torch.float64) else AGREES_IN_16_BITS
    return bool((ours - theirs.float()).abs() <= share * theirs.float().abs() + 1e-6)
