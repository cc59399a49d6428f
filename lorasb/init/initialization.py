"""`lorasb.initialize`, for one task or several sharing a basis, and `lorasb.basis_fit`, for an existing basis."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..compat.torch import unwrapped
from ..config.adapter import LoRASBConfig, WrittenHere
from ..constants import PEFT_PREFIX
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import adapted_layers, any_merged, refuse_shared_basis, refuse_uninitialized
from ..layers.unfused_experts import NAMES, OpenExperts
from ..serving.basis import check_names
from ..serving.joint_basis import KeptShares, kept_energies, share_into, share_of
from ..utils.checks import MAX_LR, parse_size
from ..utils.precision import warn_if_slow
from .cache import versions
from .factorize import factor_weight
from .init_report import InitReport
from .loss import LossFn
from .pipeline import from_gradients, rate_of_initialized
from .sampling import Loader
from .task import AutoRate, InitOptions, Layers
from .write import staging

ROUTER_SUFFIXES = ("Router", "Gate")  # endings of class names in transformers


def skipped_modules(model: nn.Module) -> list[str]:
    """Return one line per kind of skipped module, with the setting that adapts it if there is one."""
    lines = [f"{head}: shares its weight with the input embedding" for head in _tied_heads(model)]
    modules = {name.removeprefix(PEFT_PREFIX): module for name, module in model.named_modules() if name}
    routers = [name for name, module in modules.items() if type(module).__name__.endswith(ROUTER_SUFFIXES)]
    if routers:
        lines.append(f"{len(routers)} routers ({routers[0]}, ...): they choose experts, and are not adapted")
    experts = [name for name, module in modules.items() if _has_fused_experts(module)]
    if experts:
        names = ", ".join(f'"experts.{name}"' for name in NAMES)
        lines.append(f"3-D experts ({experts[0]}, ...): target_parameters=[{names}] adapts Mixtral-style ones")
    return lines


def _has_fused_experts(module: nn.Module) -> bool:
    """True if a module has the weights of all its experts in 3-D parameters, not split into linear layers."""
    named = module.named_parameters(recurse=False)
    return not isinstance(module, OpenExperts) and any(p.dim() == 3 and n.endswith("proj") for n, p in named)


def _tied_heads(model: Any) -> list[str]:
    """Name of the output head if it shares its weight with the input embedding: merging would change both."""
    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    tied = weight is not None and weight is getattr(base.get_input_embeddings(), "weight", None)
    return [name for name, module in base.named_modules() if module is head] if tied else []


LONGEST_START = 4.0  # default of `longest_start`, in AdamW steps of R; measured, docs/choosing.md


def initialize(
    model: nn.Module,
    batches: Loader = None,
    *,
    lr: float | Literal["auto"] | AutoRate | None = None,
    num_samples: int | None = None,
    update: str = "adamw",
    longest_start: float | None = LONGEST_START,
    strategy: str = "auto",
    blocks: str | None = None,
    memory_budget: float | str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    stability: bool = False,
    adapter_name: str | None = None,
    progress: bool = True,
) -> InitReport:
    """Initialize A, R and B from the first step of full fine-tuning (paper, Eq. 6-8; details in docs/method.md).

    −η·sign(Σ_i ∇W L(x_i)) = U Σ Vᵀ: B = U_r [out, r], A = V_rᵀ [r, in], R = Σ_r / s [r, r], ‖Σ_r‖ ≤ longest_start·η·r.

    Args:
        model: a patched model.
        batches: a DataLoader or a list (samples are drawn by `seed`), or another iterable of dicts (taken in order);
            each process passes its share. {"math": loader, ...} adds an adapter per task, all sharing this one's A
            and B, sets this one's R to 0, and returns a `TasksReport`.
        lr: η of R's first step: `lorasb.first_step_lr` for a schedule; "auto" measures it for AdamW (docs/choosing.md).
        num_samples: total over all ranks. None: a thousandth of the data, at least 32, at most all; all of an
            iterable without a size.
        update: "adamw" (signs), "sgd" (the mean gradient, Theorem 6) or "per-sample" (moments, docs/initialization.md).
        longest_start: largest distance of R's start from zero, in AdamW steps at the rate η. 0 starts at R = 0, None
            takes the paper's full step; ignored by update="sgd".
        strategy: "layerwise" (a block at a time), "accumulate" (passes through the whole model) or "auto"; same sums.
        blocks: name of the list of blocks ("model.layers"), if the wrong one is detected.
        memory_budget: bytes (or "6GB") for gradient sums and block inputs, on top of the model; None allows what a
            training step of 32 samples needs.
        loss_fn: `loss_fn(model, batch)`, weighted by the batch's rows; replaces L, the mean over a sample's labeled
            tokens.
        seed: for drawing samples and for the SVD; the global random state is not touched.
        cache: file for all layers' signs: if it exists, no backward runs, for any r; interrupted runs resume from it.
        stability: also measure, in another pass, how much the subspaces of two halves of the samples overlap.
        adapter_name: name of the adapter; the active one if None.
        progress: show an estimate and a progress bar (on rank 0).

    Raises:
        TypeError: batches is not an iterable of dicts.
        ValueError: bad arguments, samples, loss, gradient or cache, or too little memory; the model is unchanged.
    """
    options = InitOptions(
        lr=AutoRate() if lr == "auto" else lr or 0.0,
        update=update,
        seed=seed,
        longest_start=longest_start,
        num_samples=num_samples,
        strategy=strategy,
        blocks=blocks,
        memory_budget=parse_size(memory_budget),
        loss_fn=loss_fn,
        cache=cache,
        stability=stability,
        progress=progress,
    )
    if isinstance(batches, Mapping) and any(isinstance(value, Tensor) for value in batches.values()):
        raise TypeError("expected a list of batches, or a loader per task, got a single batch: pass [batch]")
    run = _initialize_tasks if isinstance(batches, Mapping) else _initialize
    return cast(InitReport, run(unwrapped(model), batches, adapter_name, options))


def _initialize(model: PeftModel, batches: Loader, adapter_name: str | None, options: InitOptions) -> InitReport:
    name, layers = adapted_layers(model, adapter_name)
    options, started = replace(options, adapter=name), time.perf_counter()
    if any_merged(model):
        raise ValueError("expected unmerged weights, as the base's gradients are needed: call model.unmerge_adapter()")
    refuse_shared_basis(layers, name)
    config = cast(LoRASBConfig, model.peft_config[name])
    warn_if_slow(model)
    if config.init == "update":
        cached = options.cache is not None and os.path.exists(options.cache)
        if isinstance(options.lr, str) or not 0 < options.eta <= MAX_LR or (batches is None and not cached):
            rate = f"lr={options.lr!r}" if options.lr else "no lr, or 0"
            raise ValueError(
                f"init='update' takes batches and lr > 0, at most {MAX_LR:g}, or 'auto', got "
                f"{rate if batches is not None or cached else 'no batches'}: initialize(model, loader, lr='auto')"
            )
        if isinstance(options.lr, AutoRate) and batches is None:
            raise ValueError("lr='auto' measures on samples, but a cache holds only signs: pass batches, or a rate")
        # The hooks cut the forward at every block, and each cut would cause a graph break and a recompilation.
        with staging(name) as write, torch.compiler.set_stance("force_eager"):
            found, data = from_gradients(model, layers, batches, options, write)
        report = _complete_report(model, config, found, data, started)
    else:  # data-free inits ignore batches and a rate, but "auto" is measured on the batches
        measured = isinstance(options.lr, AutoRate) and batches is not None
        rate_of = partial(rate_of_initialized, model, layers, batches, options) if measured else None
        report = without_data(model, config, layers, options, rate_of)
    # PEFT freezes every adapter but the active one; R of an inactive adapter is meant to be frozen.
    active = any(name in layer.active_adapters for layer in layers.values())
    if active and not any(layer.lorasb_R[name].requires_grad for layer in layers.values()):
        warnings.warn(
            f"adapter {name!r} is initialized but will not train, as no R requires a gradient: "
            f"call model.set_adapter({name!r})",
            stacklevel=3,
        )
    return report


def without_data(
    model: nn.Module,
    config: LoRASBConfig,
    layers: Layers,
    options: InitOptions,
    rate_of: Callable[[], float] | None = None,
) -> InitReport:
    """Run a data-free init ("lora-xs", "kaiming", "random"), as `patch` does; `rate_of` measures the report's rate."""
    started, hidden = time.perf_counter(), not options.progress
    report = InitReport(config.init, "none", None, 0, options.seed, None, 0.0)
    bar = tqdm(layers.items(), desc="factoring", unit="layer", disable=hidden, leave=False, delay=2.0)
    with staging(options.adapter) as write:
        for layer_name, layer in bar:
            factors, of_layer = factor_weight(layer_name, layer, config.init, options)
            write(layer, factors)
            report.layers.append(of_layer)
        report.rate = rate_of() if rate_of else None
    return _complete_report(model, config, report, None, started)


def _complete_report(
    model: nn.Module, config: LoRASBConfig, report: InitReport, data: str | None, began: float
) -> InitReport:
    """Complete the report, and store its provenance in the config, which is saved with the adapter."""
    report.seconds, report.left = time.perf_counter() - began, skipped_modules(model)
    fields = ("init", "update", "lr", "longest_start", "num_samples", "seed", "loss")
    facts = {name: getattr(report, name) for name in fields} | {"data_sha256": data, "versions": versions()}
    config.init_provenance = WrittenHere(facts)
    return report


@dataclass
class TasksReport:
    """Result of `lorasb.initialize` for several tasks."""

    tasks: dict[str, InitReport]  # task -> the report of its initialization, before the basis was shared
    shares: KeptShares  # share of each task's first step that the basis keeps; a separate basis keeps 1

    def __str__(self) -> str:
        lines = (f"{task}: {share:.1%} of its first step" for task, share in self.shares.overall.items())
        return "the shared basis keeps\n" + "\n".join(f"  {line}" for line in lines)


def _initialize_tasks(
    model: Any, tasks: Mapping[str, Loader], adapter_name: str | None, options: InitOptions
) -> TasksReport:
    """Initialize an adapter per task, then move all of them to one shared basis, each with its R on it."""
    if options.cache is not None:
        raise ValueError("cache holds one task's signs: initialize several tasks without it")
    if isinstance(options.lr, AutoRate):
        raise ValueError("lr='auto' measures the rate of one task, but several tasks share a basis: pass a number")
    if options.longest_start == 0:
        raise ValueError("longest_start=0 leaves no first steps, from which the shared basis is made: leave it out")
    basis, layers = adapted_layers(model, adapter_name)
    refuse_shared_basis(layers, basis)  # before any task's gradients are taken
    if (init := model.peft_config[basis].init) != "update":
        raise ValueError(
            f"expected init='update', as tasks' first steps make the basis, got {init!r}: patch with init='update'"
        )
    if len(tasks) < 2:
        raise ValueError(f"expected two tasks or more, got {len(tasks)}")
    check_names(model, list(tasks))
    with _added_adapters(model, list(tasks), basis, layers, keep=True):
        reports = {task: _initialize(model, batches, task, options) for task, batches in tasks.items()}
        return TasksReport(reports, share_into(model, list(tasks), basis))


@contextmanager
def _added_adapters(
    model: Any, names: Sequence[str], like: str, layers: Layers, init: str | None = None, keep: bool = False
) -> Iterator[None]:
    """Add inactive adapters with the layers and ranks of `like`; remove them on exit unless `keep`, and on errors."""
    config: LoRASBConfig = model.peft_config[like]
    same = {name: getattr(config, name) for name in ("r", "init", "scaling", "lora_alpha", "init_seed")}
    same |= config.options()
    cores = [core for m in model.modules() if isinstance(m, AdaptedLayer) for core in m.lorasb_R.values()]
    flags, active = [core.requires_grad for core in cores], list(model.active_adapters)
    try:
        for name in names:
            own = LoRASBConfig(rank_pattern=dict(config.rank_pattern), target_modules=set(layers), **same)
            own.init = init or own.init
            model.add_adapter(name, own)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        model.base_model.set_adapter(active)  # makes R of active adapters trainable; `flags` restores that
        for name in names:
            if not keep and name in model.peft_config:
                model.delete_adapter(name)
        for core, flag in zip(cores, flags, strict=True):
            core.requires_grad_(flag)


@dataclass(frozen=True)
class BasisFit:
    """Share of a task's first step that a basis keeps, ‖Bᵀ Δ Aᵀ‖² / ‖Δ‖².

    Δ [out, in] is the first step of an adapter of the same rank with a separate A and B, whose share is 1.

    Attributes:
        share: over all layers together.
        random: mean share that a random basis of this rank keeps, r² / (out·in), weighted like `share`.
        by_layer: the share of each layer; 1 if no sample reaches it.
        loss: mean loss of the base model on the samples.
    """

    share: float
    random: float
    loss: float | None = None
    by_layer: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def basis_fit(
    model: PeftModel,
    batches: Loader,
    *,
    basis: str = "default",
    num_samples: int | None = None,
    update: str = "adamw",
    seed: int = 0,
    progress: bool = True,
) -> BasisFit:
    """Measure how much of a task's first step a basis keeps, by initializing a temporary adapter.

    Args:
        model: a PeftModel with the adapter `basis`, initialized; it is left unchanged.
        batches: the task's batches; see `lorasb.initialize` for these, num_samples, update, seed and progress.
        basis: name of the adapter whose A and B are the basis.

    Raises:
        ValueError: no such basis, it is not initialized, or `initialize` raises one.
    """
    _, layers = adapted_layers(model, basis)
    refuse_uninitialized(layers, basis)
    own = f"{basis}_fit"
    while own in model.peft_config:
        own += "_"
    options: dict[str, Any] = {"num_samples": num_samples, "update": update, "seed": seed, "progress": progress}
    with _added_adapters(model, [own], basis, layers, init="update"):  # however the basis was initialized
        report = initialize(model, batches, lr=1.0, longest_start=None, adapter_name=own, **options)
        energies = kept_energies(layers, own, basis)
    by_chance = []  # per layer: energy that a random basis keeps of the step, and the step's energy
    for name, (_, whole) in energies.items():
        layer = layers[name]
        by_chance.append((whole * (layer.adapters[basis].r ** 2 / (layer.out_features * layer.in_features)), whole))
    by_layer = {name: share_of([pair]) for name, pair in energies.items()}
    return BasisFit(share_of(energies.values()), share_of(by_chance), report.loss, by_layer)
