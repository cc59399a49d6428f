"""Files of adapters for a bank: where they are, and the R's in them, if they belong to the bank's A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..checkpoints import shared_factors
from ..checkpoints.adapter_file import group_by_layer, read_config
from ..checkpoints.shared_factors import DIGEST
from ..constants import FACTORS, WEIGHTS_NAME
from ..utils.reading import AGAIN, safetensors_header
from .config import LoRASBConfig


@dataclass
class LoadReport:
    """What `AdapterBank.load` found.

    Attributes:
        loaded: names of adapters that are in the bank now.
        failed: name -> why it is not.
    """

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def adapters_in(folder: Path) -> list[Path]:
    """The adapter's folder itself, or those in it; of a saved model those of its further adapters."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if (folder / WEIGHTS_NAME).is_file():
        return [path for path in inside if (path / WEIGHTS_NAME).is_file()] or [folder]
    return inside or [folder]


def cores_of(folder: Path, digest: bytes, scalings: Mapping[str, float]) -> dict[str, Tensor]:
    """R by layer, times the adapter's s over the bank's.

    Args:
        folder: of the adapter.
        digest: of the bank's A and B.
        scalings: the bank's s by layer.

    Raises:
        ValueError: no adapter of LoRA-SB, a truncated file, other A and B, or more than R.
    """
    read_config(folder)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"expected {WEIGHTS_NAME} in {folder}, found none")
    safetensors_header(file)  # raises for a truncated file
    try:
        tensors = load(file.read_bytes())  # half the time of a mapped file, page by page (SmolLM2 at r = 64, Zen 3)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): {AGAIN}") from None
    factors = {key: value for key, value in tensors.items() if shared_factors.is_factor(key)}
    if (shared_factors.referenced_digest(tensors) or shared_factors.digest(factors)) != digest:
        raise ValueError(f"{folder} stands on other A and B than the bank's, or on the same in another dtype")
    others = [key for key in tensors if key != DIGEST and not any(f".{part}" in key for part in FACTORS)]
    if others:
        raise ValueError(
            f"{folder} has more than R ({others[0]}, ...): modules, biases or token rows that were trained in full "
            "have no place in a bank. Load it as an adapter of the model"
        )
    config, found = LoRASBConfig.from_pretrained(str(folder)), {}
    for name, parts in group_by_layer(tensors).items():
        core = parts.get("lorasb_R")
        if core is not None and name in scalings and core.dim():
            ratio = config.scaling_for(len(core)) / scalings[name]
            found[name] = core if ratio == 1.0 else core * ratio
    return found
