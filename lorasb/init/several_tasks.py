"""Initialization for several tasks: an adapter of each, all on one basis that keeps most of their first steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..config.adapter import LoRASBConfig
from ..layers.lookup import adapted_layers, refuse_shared_basis
from ..serving.basis_adapters import check_names
from ..serving.joint_basis import KeptShares, share_into
from .init_report import InitReport
from .sampling import Loader
from .task import AutoRate, InitOptions


@dataclass
class TasksReport:
    """Result of `lorasb.initialize` for several tasks."""

    tasks: dict[str, InitReport]  # task -> the report of its initialization, before the basis was shared
    shares: KeptShares  # what the basis keeps of each task's first step, against 1 for a separate basis

    def __str__(self) -> str:
        lines = (f"{task}: {share:.1%} of its first step" for task, share in self.shares.overall.items())
        return "the shared basis keeps\n" + "\n".join(f"  {line}" for line in lines)


def initialize_tasks(
    model: Any,
    tasks: Mapping[str, Loader],
    adapter_name: str | None,
    options: InitOptions,
    initialize: Callable[[PeftModel, Loader, str, InitOptions], InitReport],
) -> TasksReport:
    """Initialize an adapter for each task, give all of them one basis, and each its R on it."""
    if options.cache is not None:
        raise ValueError("cache is a file of one task's signs: initialize several tasks without it")
    if isinstance(options.lr, AutoRate):
        raise ValueError("lr='auto' measures the rate of one task, and several share a basis: pass a number")
    basis, layers = adapted_layers(model, adapter_name)
    refuse_shared_basis(layers, basis)  # before any task's gradients are taken
    taken = [task for task in tasks if task in model.peft_config]
    if len(tasks) < 2 or taken:
        found = f"an adapter {taken[0]!r} is there already" if taken else f"got {len(tasks)}"
        raise ValueError(f"expected two tasks or more, with names that no adapter has: {found}")
    check_names(model, list(tasks))
    config: LoRASBConfig = model.peft_config[basis]
    reports: dict[str, InitReport] = {}
    active = list(model.active_adapters)
    try:
        for task, batches in tasks.items():
            model.add_adapter(task, config_like(config, layers))
            reports[task] = initialize(model, batches, task, options)
        shares = share_into(model, list(tasks), basis)
    except BaseException:
        model.base_model.set_adapter(active)
        for task in (one for one in tasks if one in model.peft_config):
            model.delete_adapter(task)
        raise
    model.base_model.set_adapter(active)
    return TasksReport(reports, shares)


def config_like(config: LoRASBConfig, layers: Mapping[str, nn.Module]) -> LoRASBConfig:
    """The configuration of an adapter on the layers of another one, at its ranks."""
    names = ("r", "init", "scaling", "lora_dropout", "wide_factors", "equivalent_gradient", "lora_alpha", "init_seed")
    same = {name: getattr(config, name) for name in names}
    return LoRASBConfig(rank_pattern=dict(config.rank_pattern), target_modules=set(layers), **same)
