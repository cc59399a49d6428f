"""`lorasb.initialize`: checks its arguments, runs `pipeline` and reports what each layer's factors capture."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn

from ..compat.torch import uncompiled
from ..config.adapter import LoRASBConfig, WrittenHere
from ..constants import PEFT_PREFIX
from ..layers.lookup import adapted_layers, any_merged, refuse_shared_basis
from ..layers.unfused_experts import NAMES, OpenExperts
from ..utils.checks import MAX_LR, parse_size
from ..utils.precision import warn_if_slow
from .init_report import InitReport
from .loss import LossFn
from .pipeline import from_gradients, from_weights
from .provenance import provenance
from .sampling import Loader
from .several_tasks import initialize_tasks
from .task import AutoRate, InitOptions, Layers
from .write import staging

ROUTER_SUFFIXES = ("Router", "Gate")  # of class names in transformers


def skipped_modules(model: nn.Module) -> list[str]:
    """One line for each kind of skipped module, with the setting that adapts it if there is one."""
    lines = [f"{head}: shares its weight with the input embedding" for head in _tied_heads(model)]
    modules = {name.removeprefix(PEFT_PREFIX): module for name, module in model.named_modules() if name}
    routers = [name for name, module in modules.items() if type(module).__name__.endswith(ROUTER_SUFFIXES)]
    if routers:
        lines.append(f"{len(routers)} routers ({routers[0]}, ...): they choose experts, and are not adapted")
    experts = [name for name, module in modules.items() if _has_fused_experts(module)]
    if experts:
        names = ", ".join(f'"experts.{name}"' for name in NAMES)
        lines.append(f"3-D experts ({experts[0]}, ...): target_parameters=[{names}] adapts those of Mixtral's kind")
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
    """Initialize A, R and B from the first step of full fine-tuning (paper, Eq. 6-8; docs/method.md says more).

    −η·sign(Σ_i ∇W L(x_i)) = U Σ Vᵀ: B = U_r [out, r], A = V_rᵀ [r, in], R = Σ_r / s [r, r], ‖Σ_r‖ ≤ longest_start·η·r.

    Args:
        model: a patched model.
        batches: a DataLoader or a list (drawn from by `seed`), or an iterable of dicts (in order); of a rank, its own.
            {"math": loader, ...}: an adapter for each, on one basis, which is this adapter with R = 0: a `TasksReport`.
        lr: η of R's first step, `lorasb.first_step_lr` of a schedule; "auto" measures it for AdamW (docs/choosing.md).
        num_samples: over all ranks; None for min(available, max(32, n/1000)), or all of an iterable without a size.
        update: "adamw" (signs), "sgd" (the mean gradient, Theorem 6) or "per-sample" (moments, docs/choosing.md).
        longest_start: in AdamW steps of R at the rate η; 0 for R = 0, None for the full step of the text. Not of "sgd".
        strategy: "layerwise" (a block at a time), "accumulate" (passes through the whole model) or "auto"; equal sums.
        blocks: name of the list of blocks ("model.layers"), if the wrong one is detected.
        memory_budget: bytes on top of the model (or "6GB"); None allows what a training step of 32 samples needs.
        loss_fn: `loss_fn(model, batch)`, weighted by its rows, in place of L, the mean over a sample's labeled tokens.
        seed: of the draw and of the SVD; the global random state is not touched.
        cache: file for all layers' signs: where it exists no backward runs, whatever r; cut-off runs go on from it.
        stability: also measure how far the subspaces of two halves of the samples overlap, in another pass over them.
        adapter_name: name of the adapter; the active one if None.
        progress: show an estimate and a progress bar (on rank 0).

    Raises:
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
    if isinstance(batches, Mapping):
        return cast(InitReport, initialize_tasks(uncompiled(model), batches, adapter_name, options, _initialize))
    return _initialize(uncompiled(model), batches, adapter_name, options)


def _initialize(model: PeftModel, batches: Loader, adapter_name: str | None, options: InitOptions) -> InitReport:
    name, layers = adapted_layers(model, adapter_name)
    options, started = replace(options, adapter=name), time.perf_counter()
    if any_merged(model):
        raise ValueError("expected unmerged weights, as gradients are taken at the base: call model.unmerge_adapter()")
    refuse_shared_basis(layers, name)
    config = cast(LoRASBConfig, model.peft_config[name])
    warn_if_slow(model)
    if config.init == "update":
        cached = options.cache is not None and os.path.exists(options.cache)
        if not 0 < options.eta <= MAX_LR or (batches is None and not cached):
            raise ValueError(
                f"init='update' takes batches and lr > 0, at most {MAX_LR:g}: initialize(model, loader, lr=...)"
            )
        if isinstance(options.lr, AutoRate) and batches is None:
            raise ValueError("lr='auto' measures on samples, and a cache has signs alone: pass batches, or a rate")
        # The hooks cut the forward at every block, and each cut would be a graph break and a recompilation.
        with staging(name) as write, torch.compiler.set_stance("force_eager"):
            found, data = from_gradients(model, layers, batches, options, write)
        report = _recorded(model, config, found, data, started)
    else:  # the data-free inits ignore batches and lr
        report = without_data(model, config, name, layers, options.seed, options.progress)
    # PEFT freezes every adapter but the active one; R of an inactive adapter is meant to be frozen.
    active = any(name in layer.active_adapters for layer in layers.values())
    if active and not any(layer.lorasb_R[name].requires_grad for layer in layers.values()):
        warnings.warn(
            f"adapter {name!r} is initialized, and nothing of it will train, as no R requires a gradient: "
            f"model.set_adapter({name!r})",
            stacklevel=3,
        )
    return report


def without_data(
    model: nn.Module, config: LoRASBConfig, name: str, layers: Layers, seed: int = 0, progress: bool = True
) -> InitReport:
    """Run the data-free inits ("lora-xs", "kaiming", "random"), which patching calls itself."""
    started, options = time.perf_counter(), InitOptions(adapter=name, seed=seed, progress=progress)
    return _recorded(model, config, from_weights(layers, config.init, options), None, started)


def _recorded(model: nn.Module, config: LoRASBConfig, report: InitReport, data: str | None, began: float) -> InitReport:
    """Complete the report, and store its provenance in the config, which is saved with the adapter."""
    report.seconds, report.left = time.perf_counter() - began, skipped_modules(model)
    config.init_provenance = WrittenHere(provenance(report, data))
    return report
