"""`lorasb.find_lr`: find R's learning rate by short trials from the same start, which leave the model unchanged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..compat.torch import unwrapped
from ..config.adapter import WrittenHere
from ..distributed.process_group import Processes
from ..init.loss import LossFn
from ..init.sampling import Batch, rng_untouched
from ..init.task import modes_restored, to_device
from ..utils.checks import check_lr
from ..utils.precision import double

STEPS = 12  # per trial: the loss after 15% of a 75-step run ranks rates as the final loss does, within 2x (measured)
RAMP = 2 / 3  # share of a trial's steps over which the rate rises, as it does in a warm-up
JUDGED = 4  # held-out batches that measure a trial's loss
FARTHEST = 5  # most doublings or halvings of the first rate
PROBE_STEPS = 4  # in each of the two trials that refine a measured rate
OTHER_RATE = 1e-3  # rate of parameters other than R (a new head) if R's rate is measured
CLIP = 1.0  # gradient norm, transformers' default
MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
Parts = tuple[list[Batch], list[list[Batch]]]  # the batches that measure a trial's loss, and the batches of each step
ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)


@dataclass(frozen=True)
class RateTrials:
    """Results of the trials.

    Attributes:
        lr: the rate with the lowest loss; with `lr="auto"`, twice or half the measured rate.
        losses: rate -> mean loss on the held-out batches after its trial; infinite if it diverged.
        steps: steps per trial.
    """

    lr: float
    losses: dict[float, float]
    steps: int

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(self.losses.items()))
        return f"learning rate {self.lr:g}, by trials of {self.steps} steps ({tried})"


def find_lr(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    *,
    steps: int = STEPS,
    judged: int = JUDGED,
    accumulation: int = 1,
    optimizer: MakeOptimizer | None = None,
    progress: bool = True,
) -> RateTrials:
    """Try learning rates for a few steps each, and scale R's start to the best one.

    The best rates of two tasks at one rank are up to 16 times apart (REPORT.md): no rule over ranks can replace this.
    A trial trains everything that requires a gradient, always on the same batches; then parameters, global random
    states and train or eval mode are restored to the bit. From `lr` on, the rate doubles while the loss falls; if the
    first doubling does not help, it halves while the loss falls. An initialization's R is proportional to its η, so R's
    start is scaled with the rate; a loaded R is not.

    Args:
        model: a patched model, just initialized or loaded, or any other whose trained parameters require a gradient.
        batches: training batches with labels; the first `judged` measure the loss, the others, with other rows, are
            trained on. Each rank passes its own.
        lr: the rate to try first: the initialization's (`first_step_lr`), from which R's start is scaled.
        steps: steps per trial.
        judged: number of batches whose mean loss decides.
        accumulation: batches per step.
        optimizer: makes an optimizer from parameters and a rate; AdamW without weight decay if None.
        progress: show a progress bar (on rank 0).

    Returns:
        The best rate, and every loss. R is left at its start times (best rate / `lr`), a loaded R at its start.

    Raises:
        ValueError: too few batches, none with labels, a rate or a number that is not positive, or no trial with a
            finite loss; the model is unchanged.
    """
    trial = _Trial(model, lr, _read(batches, lr, steps, judged, accumulation))
    with _bar(progress) as bar:
        losses = _search(lr, lambda rate: trial.loss(rate, optimizer or ADAMW, bar))
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        tried = ", ".join(f"{rate:g}" for rate in sorted(losses))
        raise ValueError(f"no trial has a finite loss, at rates of {tried}: check the labels, or pass a lower lr")
    trial.keep(best)
    return RateTrials(best, losses, steps)


def refine_rate(
    model: nn.Module,
    batches: Iterable[Batch],
    rate: float,
    *,
    accumulation: int = 1,
    adapter: str | None = None,
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> RateTrials:
    """Double or halve a measured rate (`initialize(lr="auto")`): double it if it beats its quarter after 4 steps.

    The best rates of two tasks at one rank are up to 16 times apart. After a few steps, whether the larger of two rates
    is ahead distinguishes such tasks, but does not show how far away the best rate is. Few steps favor small rates, so
    the other rate is a quarter, not half.

    R (of `adapter`, or of every adapter) has to be initialized at `rate`, and is scaled to the returned rate.
    `loss_fn(model, batch)` replaces the model's loss. Raises the errors of `find_lr`.
    """
    trial = _Trial(model, rate, _read(batches, rate, PROBE_STEPS, JUDGED, accumulation), adapter, loss_fn)
    with _bar(progress, total=2 * PROBE_STEPS) as bar:
        losses = {tried: trial.loss(tried, trial.adamw, bar) for tried in (rate / 4, rate)}
    finite = [tried for tried, loss in losses.items() if math.isfinite(loss)]
    best = 2 * rate if losses[rate] < losses[rate / 4] else rate / 2
    if not finite:
        warnings.warn(f"no trial of learning rates has a finite loss: {rate:.2g} stays as measured", stacklevel=2)
    if len(finite) < 2:  # take the finite one itself: rates next to a diverged one are untested
        best = finite[0] if finite else rate
    trial.keep(best)
    return RateTrials(best, losses, PROBE_STEPS)


def apart(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield batches for trials, endlessly: four that measure the loss, then the others over and over, to train on.

    With fewer than eight, half of them measure the loss, repeatedly; a single batch does both.
    """
    judging = min(JUDGED, len(batches) // 2) or len(batches)
    yield from islice(cycle(batches[:judging]), JUDGED)
    yield from cycle(batches[judging:] or batches)


def _bar(progress: bool, total: int | None = None) -> tqdm:
    hidden = not progress or Processes().rank > 0
    return tqdm(desc="learning rate", total=total, unit="step", disable=hidden, leave=False)


def _search(first: float, loss: Callable[[float], float]) -> dict[float, float]:
    """Return losses by rate: `first`, then doubled while the loss falls; halved if the first doubling did not help."""
    losses = {first: loss(first)}
    for factor in (2.0, 0.5):
        best = first
        for _ in range(FARTHEST):
            losses[best * factor] = loss(best * factor)
            is_lower = losses[best * factor] < losses[best]
            if not is_lower and not (factor < 1 and math.isinf(losses[best])):
                break
            best *= factor
        if best != first:
            break
    return losses


def _read(batches: Iterable[Batch], first: float, steps: int, judged: int, accumulation: int) -> Parts:
    """Check the numbers and read a trial's batches."""
    check_lr(first, "learning rate to try first")
    for name, value in (("steps", steps), ("judged", judged), ("accumulation", accumulation)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value!r}")
    wanted = steps * accumulation + judged
    with Processes().together("reading batches for trials of the rate"):
        with rng_untouched():  # a DataLoader draws a random order
            held = list(islice(iter(batches), wanted))
        if len(held) < wanted:
            raise ValueError(
                f"trials of {steps} steps need {wanted} batches ({judged} of them for the loss), got "
                f"{len(held)}: pass more, or steps={max(1, (len(held) - judged) // accumulation)}"
            )
    return held[:judged], [held[i : i + accumulation] for i in range(judged, wanted, accumulation)]


def _started_here(config: object) -> bool:
    """True if an initialization wrote R in this process: a loaded R was trained, and other inits have no η."""
    made = getattr(config, "init_provenance", None)
    return isinstance(made, WrittenHere) and bool(made.get("lr"))


class _Trial:
    """Trains a model from its start, where R belongs to the rate `first`, measures the loss, and restores the model."""

    def __init__(
        self, model: nn.Module, first: float, parts: Parts, adapter: str | None = None, loss_fn: LossFn | None = None
    ) -> None:
        self.first, self.loss_fn, inner = first, loss_fn, unwrapped(model)
        # DistributedDataParallel stays, as it averages gradients; a compiled model would be compiled for the trials.
        self.model = model if isinstance(model, nn.parallel.DistributedDataParallel) else inner
        self.judge, self.train = parts
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("no parameter requires a gradient: model.set_adapter(name), or lorasb.patch(model)")
        self.trained = [parameter for _, parameter in named]
        # (adapter, R): the adapter's name is the last part of R's name
        cores = [(name.rpartition(".")[2], parameter) for name, parameter in named if "lorasb_R" in name]
        self.adapters = {name for name, _ in cores if adapter in (None, name)}
        self.cores = [parameter for name, parameter in cores if name in self.adapters]
        self.configs = configs = getattr(inner, "peft_config", {})
        started = {name for name, config in configs.items() if _started_here(config)}
        same = {name: config for name, config in configs.items() if getattr(config, "basis_start", "") == "same"}
        copies = {name for name, config in same.items() if config.basis in started}  # whose R starts as the basis's
        self.starts = [p for name, p in cores if name in self.adapters & (started | copies)]
        self.scaled = self.adapters & started

    @torch.no_grad()
    def scale_start(self, rate: float) -> None:
        for core in self.starts:
            core.mul_(rate / self.first)

    def keep(self, rate: float) -> None:
        """Leave R at its start for this rate, and scale η in the adapters' configurations likewise."""
        self.scale_start(rate)
        for name in self.scaled:
            self.configs[name].init_provenance["lr"] *= rate / self.first

    def adamw(self, trained: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Make an AdamW with this rate for R; other parameters get a fixed one, so that they do not decide R's."""
        cores = {id(core) for core in self.cores}
        others = [parameter for parameter in trained if id(parameter) not in cores]
        groups = [{"params": self.cores, "lr": rate}]
        if others:
            groups.append({"params": others, "lr": OTHER_RATE})
        return ADAMW(groups, rate)

    def loss(self, rate: float, make: MakeOptimizer, bar: tqdm) -> float:
        """Return the mean loss on all ranks' held-out batches after a trial at a rate; infinite if it is not finite."""
        processes = Processes()
        with processes.together("a trial of the rate"), _restored(self.model, self.trained):
            self.scale_start(rate)
            self._steps(make(self.trained, rate), bar)
            own = self._judged()
        mean = float(processes.all_reduce_sum(own.cpu().reshape(1))) / processes.world_size
        return mean if math.isfinite(mean) else math.inf

    def _steps(self, optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        self.model.train()
        ramp = max(1, round(RAMP * len(self.train)))
        peaks = [group["lr"] for group in optimizer.param_groups]  # a head may have a separate rate
        for step, batches in enumerate(self.train):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, (step + 1) / ramp)
            for batch in batches:
                (self._loss(batch) / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(1)

    @torch.no_grad()
    def _judged(self) -> Tensor:
        self.model.eval()
        return torch.stack([double(self._loss(batch)) for batch in self.judge]).mean()

    def _loss(self, batch: Batch) -> Tensor:
        batch = to_device(batch, self.trained[0].device)
        loss: Tensor | None = self.loss_fn(self.model, batch) if self.loss_fn else self.model(**batch).loss
        if loss is None:
            raise ValueError(f"the model gives no loss: batches need labels, and have {', '.join(batch)}")
        return loss


@contextmanager
def _restored(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    with ExitStack() as restored, rng_untouched(), modes_restored(model):  # dropout draws
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
        for statistics in (buffer for norm in norms for buffer in norm.buffers()):
            restored.callback(statistics.copy_, statistics.clone())
        for parameter in trained:
            restored.callback(parameter.detach().copy_, parameter.detach().clone())
            restored.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        yield
