"""Checkpoints of one run share A and B, which never change: each holds R, and a link to the one file of factors.

A folder is whole by itself: `lorasb_factors.safetensors` lies in it, as a hard link where the file system has them, so
that any checkpoint may be deleted, copied or loaded alone. `adapter_model.safetensors` has R, what was trained whole,
and the digest of the factors that it belongs to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..constants import FACTORS_NAME, FROZEN_FACTORS, PEFT_PREFIX, WEIGHTS_NAME
from ..utils.atomic_files import replacing, safetensors_header

DIGEST = "lorasb_factors_digest"  # uint8 [32] among R's


def share(folder: Path) -> None:
    """Split the adapters saved in a checkpoint's folder, and in its subfolders, into R and shared factors.

    What is on the disk is whole at every moment: the factors are there before the file that points to them.
    """
    for weights in sorted(folder.rglob(WEIGHTS_NAME)):
        tensors = load_file(str(weights))
        factors = {key: value for key, value in tensors.items() if is_factor(key)}
        if not factors:
            continue
        found = digest(factors)
        _put(weights.with_name(FACTORS_NAME), factors, found.hex(), folder)
        rest = {key: value for key, value in tensors.items() if key not in factors}
        rest[DIGEST] = torch.tensor(list(found), dtype=torch.uint8)
        with replacing(weights) as temporary:
            save_file(rest, str(temporary), metadata={"format": "pt"})


def joined(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors with the factors that they belong to; as they are where `folder` has not got them.

    Raises:
        ValueError: the folder's factors are damaged.
    """
    file = folder / FACTORS_NAME
    wanted = wanted_digest(tensors)
    if wanted is None or not file.is_file() or _digest_of(file) != wanted.hex():
        return tensors
    factors = load_file(str(file))
    if digest(factors) != wanted:
        raise ValueError(f"{file} is damaged: its A and B are not what the checkpoint was made with")
    device = tensors[DIGEST].device
    rest = {key: value for key, value in tensors.items() if key != DIGEST}
    return rest | {key: value.to(device) for key, value in factors.items()}


def missing(place: object = None) -> ValueError:
    """The error where the factors are not to be had."""
    where = f" in {place}" if place else ""
    return ValueError(
        f"this checkpoint holds R alone, and its {FACTORS_NAME} (A and B) was not found{where}: load the folder with "
        "PeftModel.from_pretrained or load_adapter of a PeftModel, with the file of any checkpoint of its run in it"
    )


def is_factor(key: str) -> bool:
    """Whether a tensor's name is that of an A or a B."""
    return any(f".{factor}" in key for factor in FROZEN_FACTORS)


def wanted_digest(tensors: dict[str, Tensor]) -> bytes | None:
    """The digest of the factors that these tensors belong to; None where they are whole."""
    return bytes(tensors[DIGEST].tolist()) if DIGEST in tensors else None


def digest(factors: dict[str, Tensor]) -> bytes:
    """SHA-256 over names from the layer on, dtypes, shapes and bits."""
    total = hashlib.sha256()
    for key in sorted(factors):
        value = factors[key].detach().cpu().contiguous()
        total.update(f"{key.removeprefix(PEFT_PREFIX)} {value.dtype} {list(value.shape)}".encode())
        total.update(value.view(torch.uint8).numpy().data)
    return total.digest()


def _put(target: Path, factors: dict[str, Tensor], hexadecimal: str, checkpoint: Path) -> None:
    """The factors as a link to another checkpoint's, or as a file of their own."""
    inside = target.relative_to(checkpoint)
    others = (other / inside for other in sorted(checkpoint.parent.iterdir()) if other.is_dir() and other != checkpoint)
    same = next((other for other in others if other.is_file() and _digest_of(other) == hexadecimal), None)
    with replacing(target) as temporary:
        if same is None:
            save_file(factors, str(temporary), metadata={"format": "pt", "digest": hexadecimal})
            return
        temporary.unlink()
        try:
            os.link(same, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(same, temporary)


def _digest_of(file: Path) -> str | None:
    """What a file of factors says that it holds; None where it is no whole file."""
    try:
        safetensors_header(file)
        with safe_open(str(file), framework="pt") as reader:
            metadata: dict[str, str] = reader.metadata() or {}
    except (ValueError, OSError):
        return None
    return metadata.get("digest")
