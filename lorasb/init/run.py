"""`lorasb.initialize`: from a patched model and some batches to A, R and B in place."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._version import __version__
from ..config import LoRASBConfig
from ..linear import LoRASBLinear
from ..lookup import adapted_layers, any_merged
from .accumulator import GradientSums
from .factors import Factors, energy, from_gradient, kaiming, lora_xs
from .loss import LossFn, backward_over_samples
from .report import InitReport, LayerReport
from .samples import Samples, select

UPDATES = ("adamw", "sgd")
STRATEGIES = ("auto", "accumulate")
Layers = dict[str, LoRASBLinear]


def initialize(
    model: nn.Module,
    batches: Any = None,
    *,
    lr: float | None = None,
    num_samples: int | None = None,
    update: str = "adamw",
    strategy: str = "auto",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    adapter_name: str | None = None,
    progress: bool = True,
) -> InitReport:
    """Fill A, R and B from the first step that full fine-tuning would take (paper, Eq. 6-8).

    With G = Σ_i ∇W L(x_i) over samples and ΔW = −η·sign(G) = U Σ Vᵀ: B = U_r, A = V_rᵀ, R = Σ_r / s. L(x_i) is the
    mean over sample i's own labelled tokens, so the result does not depend on how samples are batched. No base weight
    ever requires a gradient; sums are fp32.

    Args:
        model: a patched model.
        batches: a DataLoader (samples are drawn from its data set by `seed`), a list of dicts of tensors (drawn
            likewise), or any iterable of dicts (taken in order). Not needed for the data-free inits of the config.
        lr: η of the simulated step; `lorasb.first_step_lr` gives the one of a schedule.
        num_samples: how many; None takes min(available, max(32, n/1000)), or all of an iterable without a size.
        update: "adamw" (signs) or "sgd" (the gradient itself, Theorem 6).
        strategy: "accumulate" keeps the sums of all layers; "auto" chooses.
        loss_fn: `loss_fn(model, batch)`, where the model's own `.loss` will not do. It counts times the batch's rows.
        seed: of the samples drawn and of the SVD. The global random state does not move.
        adapter_name: which adapter; the active one unless given.
        progress: show progress bars.

    Returns:
        An `InitReport`: what each layer keeps, singular values, times.

    Raises:
        ValueError: bad arguments, no samples, no loss, a gradient that is zero or not finite: the model stays as it is.
    """
    started = time.perf_counter()
    name, layers = _unmerged_layers(model, adapter_name)
    config: LoRASBConfig = cast(Any, model).peft_config[name]
    _check(update, strategy)
    if config.init == "update":
        if batches is None or lr is None or not 0 < lr < float("inf"):
            raise ValueError("init='update' takes batches and lr > 0: initialize(model, loader, lr=...)")
        samples = select(batches, num_samples, seed)
        with _undisturbed(model, layers):
            sums, loss = _gradient_sums(model, layers, samples, loss_fn, progress)
        found = _factor_gradients(sums, layers, name, lr, update, seed, progress)
        seen, data_hash = samples.seen, samples.data_hash
    else:
        found = _factor_weights(config.init, layers, name, seed, progress)
        loss, seen, data_hash, lr, update = None, 0, None, None, "none"
    for key, (factors, _) in found.items():
        layers[key].set_factors(name, factors.b, factors.core, factors.a)
    seconds = time.perf_counter() - started
    report = InitReport(config.init, update, lr, seen, seed, loss, seconds, [entry for _, entry in found.values()])
    config.init_provenance = _provenance(report, data_hash)
    return report


def _check(update: str, strategy: str) -> None:
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")


def _unmerged_layers(model: nn.Module, adapter_name: str | None) -> tuple[str, Layers]:
    name, layers = adapted_layers(model, adapter_name)
    if any_merged(model):
        raise ValueError("expected unmerged weights, as gradients are taken at the base: call model.unmerge_adapter()")
    return name, layers


@contextmanager
def _undisturbed(model: nn.Module, layers: Layers) -> Iterator[None]:
    """The bare base model in evaluation mode without a key-value cache; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    disabled = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, LoRASBLinear)]
    model_config = getattr(model, "config", None)
    cached = getattr(model_config, "use_cache", None)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer, _ in disabled:
            layer._disable_adapters = True
        if cached is not None:
            model_config.use_cache = False  # type: ignore[union-attr]
        with torch.enable_grad():
            yield
    finally:
        if cached is not None:
            model_config.use_cache = cached  # type: ignore[union-attr]
        for layer, state in disabled:
            layer._disable_adapters = state
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _gradient_sums(
    model: nn.Module, layers: Layers, samples: Samples, loss_fn: LossFn | None, progress: bool
) -> tuple[dict[str, Tensor], float]:
    """ΣG by layer name, and the mean loss of the samples."""
    device = next(next(iter(layers.values())).lorasb_R.parameters()).device
    total = 0.0
    with GradientSums(layers) as sums:
        for batch in tqdm(samples, desc="first-step gradients", unit="batch", disable=not progress, leave=False):
            total += backward_over_samples(model, _to_device(batch, device), loss_fn)
    if not sums.sums:
        raise ValueError("no sample has a labelled token: every label of these batches is -100")
    for name in layers:
        if name not in sums.sums:
            raise ValueError(
                f"layer {name!r} was never reached by the loss of these batches: leave it out with exclude_modules, "
                "or pass batches that use it"
            )
    return sums.sums, total / samples.seen


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _factor_gradients(
    sums: dict[str, Tensor], layers: Layers, adapter: str, lr: float, update: str, seed: int, progress: bool
) -> dict[str, tuple[Factors, LayerReport]]:
    for name, gradient in sums.items():
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"the gradient of layer {name!r} has NaN or Inf entries: check the data, or load the model in fp32 or "
                "bf16. Nothing was changed"
            )
        if not gradient.any():
            raise ValueError(
                f"the gradient of layer {name!r} is zero: the loss does not depend on it. Nothing was changed"
            )
    found = {}
    for index, name in enumerate(tqdm(layers, desc="factoring", unit="layer", disable=not progress, leave=False)):
        started, layer = time.perf_counter(), layers[name]
        gradient = sums.pop(name)
        factors = from_gradient(gradient, layer.r[adapter], lr, layer.scaling[adapter], update, seed + index)
        kept = energy(torch.sign(gradient), factors), energy(gradient, factors)
        zeros = gradient.numel() - int(torch.count_nonzero(gradient))
        found[name] = factors, _describe(name, factors, kept, zeros, time.perf_counter() - started)
    return found


def _factor_weights(
    kind: str, layers: Layers, adapter: str, seed: int, progress: bool
) -> dict[str, tuple[Factors, LayerReport]]:
    found = {}
    for index, name in enumerate(tqdm(layers, desc="factoring", unit="layer", disable=not progress, leave=False)):
        started, layer = time.perf_counter(), layers[name]
        weight, r = layer.dense_weight().detach().float(), layer.r[adapter]
        if kind == "lora-xs":
            factors = lora_xs(weight, r, seed + index)
        else:
            factors = kaiming(weight, r, layer.scaling[adapter], seed + index)
        found[name] = factors, _describe(name, factors, (None, None), 0, time.perf_counter() - started)
    return found


def _describe(
    name: str, factors: Factors, kept: tuple[float | None, float | None], zeros: int, seconds: float
) -> LayerReport:
    shape = (factors.b.shape[0], factors.a.shape[1])
    sigma = tuple(float(value) for value in factors.sigma)
    return LayerReport(name, shape, len(sigma), kept[0], kept[1], sigma, zeros, seconds)


def _provenance(report: InitReport, data_hash: str | None) -> dict[str, Any]:
    return {
        "init": report.init,
        "update": report.update,
        "lr": report.lr,
        "num_samples": report.num_samples,
        "seed": report.seed,
        "data_sha256": data_hash,
        "loss": report.loss,
        "versions": {
            "lorasb": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("transformers", "peft")},
        },
    }
