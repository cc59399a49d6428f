"""PEFT's reading of an adapter's file, with the A and B that a run's checkpoints share put to it.

PEFT tells a method what the file holds, but not where it lies, and the factors lie beside it. So the function that
reads it is wrapped, once, where PEFT calls it. Files of other methods pass through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.peft_model
import peft.utils
import peft.utils.save_and_load
from torch import Tensor

from ..checkpoints import shared_factors
from ..checkpoints.shared_factors import DIGEST, join_factors
from ..constants import FACTORS_NAME, FROZEN_FACTORS, PEFT_PREFIX
from ..layers.linear import LoRASBLinear

NAME = "load_peft_weights"
HOMES = (peft.utils.save_and_load, peft.utils, peft.peft_model, peft)


def install() -> None:
    """Wrap the function in every module that has it; a second time does nothing."""
    for home in HOMES:
        original = getattr(home, NAME)
        if not hasattr(original, "joins_factors"):
            setattr(home, NAME, _joining(original))


def _joining(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @functools.wraps(original)
    def load(model_id: Any, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        """PEFT's own, then A and B from beside the file."""
        tensors = original(model_id, *arguments, **options)
        if DIGEST not in tensors:
            return tensors
        folder = _folder(str(model_id), options)
        return tensors if folder is None else join_factors(tensors, folder)

    load.joins_factors = True  # type: ignore[attr-defined]
    return load


def _folder(model_id: str, options: dict[str, Any]) -> Path | None:
    """The folder that has the factors: the adapter's own, or where the Hub's file was put."""
    folder = Path(model_id, options.get("subfolder") or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    known = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    try:
        found = hf_hub_download(model_id, FACTORS_NAME, **{k: v for k, v in options.items() if k in known})
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None
    return Path(found).parent


def with_factors(tensors: dict[str, Tensor], adapter_name: str, layers: dict[str, LoRASBLinear]) -> dict[str, Tensor]:
    """A checkpoint's tensors with its A and B, where they were not beside it and the model has them."""
    wanted = shared_factors.referenced_digest(tensors)
    if wanted is None:
        return tensors
    own = {
        f"{name}.{part}": getattr(layer, part)[adapter_name].detach()
        for name, layer in layers.items()
        for part in FROZEN_FACTORS
    }
    if shared_factors.digest(own) != wanted:
        raise shared_factors.missing_factors_error()
    prefix = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in tensors) else ""
    rest = {key: value for key, value in tensors.items() if key != shared_factors.DIGEST}
    return rest | {f"{prefix}{key}": value for key, value in own.items()}
