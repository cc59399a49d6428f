"""The initialization loss Σ_i L(x_i): L(x_i) is the mean over sample i's tokens, however samples are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..constants import IGNORED
from .sampling import Batch, batch_size, take_rows

LossFn = Callable[[nn.Module, Batch], Tensor]
# Largest relative difference between a model's loss and the one recomputed here in fp32 from its logits: it allows
# for rounding, of a mean over many tokens in fp32 and of a loss in 16 bits (bf16: 2^-7 = 7.8e-3).
LOSS_TOLERANCE = 1e-5
LOSS_TOLERANCE_16_BITS = 8e-3


def backward_over_samples(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> float:
    """Run backward on a batch's Σ_i L(x_i), and return it; L(x_i) is the mean over sample i's own labeled tokens."""
    # A model's own loss is a mean over all tokens of the batch, which gives long samples more weight. If that mean can
    # be reproduced from the logits, the gradient at the logits is rescaled per sample; if not, samples run one by one.
    rows = batch_size(batch)
    if loss_fn is not None:
        # Losses are usually means over the batch; times the number of rows, that is a sum over samples.
        loss = _checked(loss_fn(model, batch), batch) * rows
        loss.backward()
        return float(loss.detach())
    if not labeled_rows(batch):
        return 0.0  # a mean over nothing would be NaN
    outputs = model(**batch)
    logits = _field(outputs, "logits")
    if _first_label_only(batch, _field(outputs, "loss")):
        if logits is not None and logits.requires_grad:
            (logits.sum() * 0).backward()  # a gradient of zeros: a sharded model's ranks communicate in backward
        return 0.0
    loss = _checked(_field(outputs, "loss"), batch)
    if rows == 1:  # the batch's mean is the sample's own
        del outputs, logits  # the graph does not need them, and logits of a large vocabulary are most of the memory
        loss.backward()
        return float(loss.detach())
    if logits is None or (weights := _weights(loss, logits, batch)) is None:
        del outputs, loss, logits  # frees this graph before the samples build theirs
        return sum(backward_over_samples(model, take_rows(batch, torch.tensor([i])), None) for i in range(rows))
    scale, total = weights
    # The gradient of the batch's mean at sample i's logits, times (tokens of the batch) / (tokens of sample i), is the
    # gradient of L(x_i): one backward suffices for all samples.
    logits.register_hook(lambda g: (g * scale.view(-1, *(1,) * (g.dim() - 1))).to(g.dtype))
    del outputs, logits
    loss.backward()
    return total


def _label_ids(batch: Batch) -> Tensor | None:
    """Return the labels if they are token or class ids, else None."""
    labels = batch.get("labels")
    return labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def labeled_rows(batch: Batch) -> int:
    """Number of samples that have at least one label; all samples if the labels are not token or class ids."""
    labels = _label_ids(batch)
    if labels is None:
        return batch_size(batch)
    return int((labels != IGNORED).flatten(1).any(1).sum()) if labels.dim() > 1 else int((labels != IGNORED).sum())


def _first_label_only(batch: Batch, loss: object) -> bool:
    """True if a causal model has nothing to predict: it shifts labels by one, and only first positions have one."""
    # Its loss is then NaN, a mean over nothing, which is not an error in the data.
    labels = _label_ids(batch)
    if labels is None or labels.dim() != 2 or labels.shape[1] < 2 or not isinstance(loss, Tensor):
        return False
    return bool((labels[:, 1:] == IGNORED).all()) and bool(loss.detach().isnan().all())


def _field(outputs: object, name: str) -> Tensor | None:
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, Tensor) else None


def _checked(loss: object, batch: Batch) -> Tensor:
    """Return the loss if it is a finite scalar; without a graph, as a leaf, so that `backward` works."""
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned no loss for a batch with {', '.join(sorted(batch))}: add labels to the batches, or "
            "pass loss_fn=lambda model, batch: ..."
        )
    if loss.numel() != 1:
        raise ValueError(f"expected one loss, got a tensor {list(loss.shape)}: reduce it to its mean")
    if not torch.isfinite(loss.detach()).all():
        raise ValueError(f"the loss of an initialization batch is {float(loss.detach())}: check the data and the dtype")
    # There is no graph if a pass reaches none of its layers (experts without tokens): other passes may reach theirs.
    return loss if loss.requires_grad else loss.detach().requires_grad_()


@torch.no_grad()
def _weights(loss: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, float] | None:
    """Return (factor per sample from batch mean to its own, Σ_i L(x_i)); None if the loss cannot be reproduced."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or logits.shape[0] != labels.shape[0] or not logits.requires_grad:
        return None
    # accelerate's wrappers return converted copies of the logits, on which a hook would never run. The graph is
    # retained for the backward that follows.
    if torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0] is None:
        return None
    tolerance = LOSS_TOLERANCE if loss.dtype in (torch.float32, torch.float64) else LOSS_TOLERANCE_16_BITS
    for sums, counts in _candidates(logits.float(), labels):
        total, per_sample = counts.sum(), counts.clamp(min=1)  # samples without labels have no gradient to scale
        if bool((sums.sum() / total - loss.float()).abs() <= tolerance * loss.float().abs() + 1e-6):
            return total / per_sample, float((sums / per_sample).sum())
    return None


def _candidates(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(Σ of losses, number of labeled positions) per sample, for each loss that fits the labels' shape and dtype."""
    # transformers' losses: causal, masked and sequence-to-sequence LM, classification, regression, multi-label.
    if labels.dtype == torch.long and labels.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == labels.shape:
        yield _cross_entropy(logits[:, :-1], labels[:, 1:])  # causal: predict the next token
        yield _cross_entropy(logits, labels)  # masked or encoder-decoder: predict the token in place
    elif labels.dtype == torch.long and labels.dim() == 1 and logits.dim() == 2:
        yield _cross_entropy(logits[:, None], labels[:, None])
    elif labels.is_floating_point():
        values = logits.reshape(logits.shape[0], -1)
        targets = labels.reshape(labels.shape[0], -1).float()
        if values.shape == targets.shape:
            counts = torch.full((len(values),), float(values.shape[1]), device=values.device)
            yield (values - targets).square().sum(1), counts
            yield F.binary_cross_entropy_with_logits(values, targets, reduction="none").sum(1), counts


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Σ of losses and number of labels per sample, from logits [samples, positions, classes]."""
    # Flattened to [samples·positions, classes]: cross_entropy takes 3-D inputs with the classes in the middle, and its
    # sum over a large, strided vocabulary was off by more than LOSS_TOLERANCE.
    flat, labels = logits.reshape(-1, logits.shape[-1]), labels.to(logits.device)
    losses = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none").view(labels.shape)
    return losses.sum(1), (labels != IGNORED).sum(1).to(losses.device, losses.dtype)
