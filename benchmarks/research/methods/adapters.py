"""Applies each method to a model: PEFT's methods, LoRA-Pro's optimizer, and lorasb's methods."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import lorasb
from benchmarks.research.methods import starts
from benchmarks.research.methods.gradients import take_again, weigh_by_spread, whiten
from benchmarks.research.methods.grid import BY_SCORE, CORE, METHODS, SHARING, Cell, Method, Task, task_named
from benchmarks.research.methods.problems import Batch, Problem, batches_of
from lorasb.init.task import AutoRate

Batches = Callable[[int], list[Batch]]  # number of samples -> batches for the initialization
LORA_GA_SAMPLES = 32  # as many as LoRA-SB takes


def put_in(problem: Problem, method: Method, cell: Cell, batches: Batches, warmup: int) -> tuple[Any, float, Any]:
    """Return the model with the method applied, the seconds this took, and lorasb's report, if any."""
    started = time.perf_counter()
    torch.manual_seed(cell.seed)
    report = None
    model = problem.model
    if method.family == CORE:
        model, report = _core(problem, cell, batches, warmup)
    elif method.name != "full":
        model = _lora(problem, method, cell, batches)
    return model, time.perf_counter() - started, report


def _core(problem: Problem, cell: Cell, batches: Batches, warmup: int) -> tuple[Any, Any]:
    options, eta = settings(cell), lorasb.first_step_lr(cell.lr, warmup)
    config = lorasb.LoRASBConfig(
        r=cell.r,
        target_modules=problem.targets,
        modules_to_save=problem.head or None,
        task_type=problem.task_type,
        init=options.get("init", "update"),
        init_seed=cell.seed,
        # scaling 1 if the rate already depends on the rank; LoRA-XS's own for classification is 16/r
        lora_alpha=float(cell.r) if options.get("alpha_is_rank") else None,
    )
    errors = starts.quantized(problem.model, tuple(problem.targets)) if options.get("four_bits") else {}
    model: Any = lorasb.patch(problem.model, config)
    if options.get("ranks_by_energy"):
        energies = begin(model, problem, cell, batches, eta)
        budget = sum(layer.r[starts.ADAPTER] ** 2 for layer in starts.layers(model).values())
        ranks = energies.suggest_ranks(parameters=budget, of="grad").rank_pattern
        model = lorasb.patch(model.unload(), replace(config, rank_pattern=ranks))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "signs" if "noise" in options else None
        if options.get("joint"):
            report = _joint(model, problem, cell, eta)
        elif config.init == "update":
            report = begin(model, problem, cell, batches, eta, cache)
        else:  # done while patching
            report = model.base_model.init_reports[starts.ADAPTER]
        starts.change(model, options, eta, cell.seed, cache)
    if options.get("corrected"):
        starts.corrected(model, errors)
    if options.get("whitened"):
        whiten(model, batches(sample_count(problem, options)))
    if options.get("by_spread"):
        weigh_by_spread(model, batches(sample_count(problem, options)), eta)
    return model, report


def _joint(model: Any, problem: Problem, cell: Cell, eta: float) -> Any:
    """Initialize an adapter for each task of `SHARING` on one basis; activate that of the cell's task.

    Returns:
        The active adapter's share of the first step's energy, as `energy_sign`.
    """
    count = sample_count(problem, settings(cell))
    tasks = {name: batches_of(BY_SCORE[f"{name} by score"], count, cell.seed) for name in SHARING}
    report: Any = lorasb.initialize(model, tasks, lr=eta, num_samples=count, seed=cell.seed, progress=False)
    own = task_named(cell.task).name
    model.set_adapter(own)
    return SimpleNamespace(energy_sign=report.shares.overall[own])


def settings(cell: Cell) -> dict[str, Any]:
    """A method's options, and over them the cell's own."""
    return {**METHODS[cell.method].options, **dict(cell.options)}


def begin(model: Any, problem: Problem, cell: Cell, batches: Batches, eta: float, cache: Path | None = None) -> Any:
    """Initialize by a cell's options."""
    options = settings(cell)
    count = sample_count(problem, options)
    return lorasb.initialize(
        model,
        batches(count),
        lr=AutoRate(cell.lr / eta) if options.get("measured") else eta,
        num_samples=count,
        seed=cell.seed,
        progress=False,
        cache=cache,
        **{name: options[name] for name in ("update", "longest_start") if name in options},
    )


def sample_count(problem: Problem, options: dict[str, Any]) -> int:
    """Return the number of samples: `samples` from the cell's options, or the library's default."""
    return options.get("samples") or min(len(problem.train), max(32, -(-len(problem.train) // 1000)))


def begin_again(model: Any, problem: Problem, cell: Cell, batches: Batches, warmup: int) -> None:
    """A second SVD in the middle of training: what was learned goes into the base weights, and R starts again."""
    for layer in starts.layers(model).values():
        layer.base.parameter().data = layer.merged_weight([starts.ADAPTER])
    begin(model, problem, cell, batches, lorasb.first_step_lr(cell.lr, warmup))
    model.train()


def refresh(model: Any, problem: Problem, cell: Cell, batches: Batches, opt: Any) -> list[nn.Parameter]:
    """Add subspaces of the current gradient to what was learned, and reset the moments.

    Returns:
        The parameters that train from here on.
    """
    options = settings(cell)
    found = take_again(
        model, cell.r, cell.seed, batches(options.get("later_samples") or sample_count(problem, options))
    )
    opt.param_groups[0]["params"] = found
    opt.state.clear()
    return found


def _lora(problem: Problem, method: Method, cell: Cell, batches: Batches) -> Any:
    """PEFT's LoRA, or the config class that the cell's option `peft` names, with the cell's other options."""
    import peft

    given = dict(cell.options)
    kind = given.pop("peft", "LoraConfig")
    if kind == "LoraConfig":
        given = {"r": cell.r, "lora_alpha": cell.r} | method.options | given
    config = getattr(peft, kind)(
        target_modules=problem.targets, modules_to_save=problem.head or None, task_type=problem.task_type, **given
    )
    if method.name == "LoRA-GA":
        _gradients(problem, config, batches)
    return peft.get_peft_model(problem.model, config)


def _gradients(problem: Problem, config: Any, batches: Batches) -> None:
    """Compute the gradients that LoRA-GA's initialization reads."""
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config.lora_ga_config = LoraGAConfig()
    drawn = batches(LORA_GA_SAMPLES)

    def step() -> None:
        for batch in drawn:
            problem.model(**batch).loss.backward()

    preprocess_loraga(problem.model, config, step)


def optimizer(model: nn.Module, method: Method, task: Task, cell: Cell, head: Sequence[str]) -> Any:
    """AdamW without weight decay, Muon or SOAP for R alone, or LoRA-Pro's AdamW; a head has its own rate."""
    if method.name == "LoRA-Pro":
        return _lora_pro(model, cell.lr, (task.head_lr or cell.lr) if head else None)
    heads: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if any(part in name.split(".") for part in head) else others).append(parameter)
    if settings(cell).get("optimizer") == "muon":
        return torch.optim.Muon(others, lr=cell.lr, weight_decay=0.0)
    if settings(cell).get("optimizer") == "soap":
        return _soap(others, cell.lr)
    groups: list[dict[str, Any]] = [{"params": others, "lr": cell.lr}]
    if heads:
        groups.append({"params": heads, "lr": task.head_lr or cell.lr})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _soap(parameters: list[nn.Parameter], lr: float) -> Any:
    """Adam in the eigenbasis of each R's second moments."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ImportError("SOAP needs its package: pip install --no-deps pytorch-optimizer") from error

    return SOAP(parameters, lr=lr, weight_decay=0.0)


def _lora_pro(model: nn.Module, lr: float, head_lr: float | None) -> Any:
    """LoRA-Pro's AdamW; `head_lr` is the rate of a head, None without one."""
    try:
        from lora_pro import LoRAProAdamW
    except ImportError as error:
        raise ImportError("LoRA-Pro needs its optimizer: pip install --no-deps lora-pro-adamw") from error

    pro = LoRAProAdamW(model, lr=lr, weight_decay=0.0)
    if head_lr is not None:  # its first group holds all parameters outside the LoRA
        pro.param_groups[0]["lr"] = head_lr
    return pro
