"""Loading of checkpoints that hold R alone: A and B are added from the factor file that the run's checkpoints share.

PEFT hands a method the tensors of an adapter file, but not its folder, which has the factor file. So PEFT's own
`load_peft_weights` is wrapped, once, wherever PEFT calls it. Files of other methods are returned as they are.
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
from ..constants import FACTORS_NAME, PEFT_PREFIX
from ..layers.linear import LoRASBLinear
from . import basis
from .config import LoRASBConfig

LOADER = "load_peft_weights"
# Every module that PEFT imports the function into by name; patching the defining module alone would miss its callers.
MODULES_WITH_LOADER = (peft.utils.save_and_load, peft.utils, peft.peft_model, peft)


def install() -> None:
    """Wrap the function in every module that has it; idempotent."""
    for module in MODULES_WITH_LOADER:
        original = getattr(module, LOADER)
        if not hasattr(original, "joins_factors"):
            setattr(module, LOADER, _with_shared_factors(original))


def _with_shared_factors(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @functools.wraps(original)
    def load(model_id: Any, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        """PEFT's function, with A and B added from the file's folder."""
        tensors = original(model_id, *arguments, **options)
        if DIGEST not in tensors:  # a complete adapter, or another method's
            return tensors
        folder = _folder(str(model_id), options)
        # the digest stays, as the model may have these very tensors
        return tensors if folder is None else join_factors(tensors, folder) | {DIGEST: tensors[DIGEST]}

    load.joins_factors = True  # type: ignore[attr-defined]
    return load


def _folder(model_id: str, options: dict[str, Any]) -> Path | None:
    """The folder with the factor file: the adapter's, or the local cache of the Hub's; None if there is none."""
    folder = Path(model_id, options.get("subfolder") or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    supported = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    try:
        factor_file = hf_hub_download(model_id, FACTORS_NAME, **{k: v for k, v in options.items() if k in supported})
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None  # not an error yet: `with_factors` tries the A and B that the model has
    return Path(factor_file).parent


def with_factors(
    tensors: dict[str, Tensor],
    adapter_name: str,
    layers: dict[str, LoRASBLinear],
    config: LoRASBConfig,
    share: bool = True,
) -> dict[str, Tensor]:
    """A file's tensors with the A and B that its R belongs to, of the model where it has them.

    With `share` the adapter is to be loaded: it has the model's own A and B, or leaves those for the file's.

    Raises:
        ValueError: neither the model nor the file's folder has them, or others stand on those that they would replace.
    """
    expected_digest = shared_factors.referenced_digest(tensors)
    if expected_digest is None:
        _make_room(tensors, adapter_name, layers, config, share)
        return tensors
    # R is meaningless with other factors, so the digest decides, not the shapes.
    found = basis.with_digest(layers, expected_digest, first=adapter_name)
    others = {key: value for key, value in tensors.items() if key != DIGEST}
    if found is None and any(shared_factors.is_factor(key) for key in others):  # from the folder
        _make_room(others, adapter_name, layers, config, share)
        config.basis = None
        return others
    if found is None:
        raise _other_basis(adapter_name, config) if config.basis else shared_factors.missing_factors_error()
    if found != adapter_name and share:
        basis.stand_on(layers, adapter_name, found)
        config.basis = next(iter(layers.values())).basis[adapter_name]
    # transformers' load_adapter strips PEFT's prefix before this; A and B must be named as R is.
    prefix = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in tensors) else ""
    own = {key: value for key, value in others.items() if not shared_factors.is_factor(key)}
    return own | {f"{prefix}{key}": value for key, value in basis.frozen_factors(layers, found).items()}


def _make_room(
    tensors: dict[str, Tensor],
    adapter_name: str,
    layers: dict[str, LoRASBLinear],
    config: LoRASBConfig,
    share: bool,
) -> None:
    if share and layers and basis.make_room(layers, adapter_name, tensors):
        config.basis = None


def _other_basis(adapter_name: str, config: LoRASBConfig) -> ValueError:
    return ValueError(
        f"adapter {adapter_name!r} holds R alone, and was trained on a basis {config.basis!r} that neither this model "
        "nor the adapter's folder has: load the adapter that it stands on first (model.load_adapter(folder, "
        f"{config.basis!r})). One of that name with other A and B is not it"
    )
