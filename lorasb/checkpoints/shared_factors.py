"""Share A and B between the checkpoints of a run: each has R and a hard link to the factor file, so that any of them
may be deleted, copied or loaded alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..constants import CONFIG_NAME, FACTORS_NAME, FROZEN_FACTORS, PEFT_PREFIX, WEIGHTS_NAME
from ..utils.atomic_files import replacing
from ..utils.reading import AGAIN, read_json, read_tensors, safetensors_header

DIGEST = "lorasb_factors_digest"  # key in adapter_model.safetensors: SHA-256 of the factors, uint8 [32]


def share(folder: Path, like: Path | None = None) -> None:
    """Split the adapters saved in a checkpoint's folder and its subfolders into R and shared factors.

    The factor file is a hard link to that of the folder `like`, or of a sibling checkpoint, if the factors are equal.
    """
    for weights in sorted(folder.rglob(WEIGHTS_NAME)):  # PEFT saves adapters other than "default" in subfolders
        tensors = read_tensors(weights)
        factors = {key: value for key, value in tensors.items() if is_factor(key)}
        if not factors:
            continue
        factors_digest = digest(factors)
        # first, so that an interruption leaves a valid checkpoint
        _link_or_write(weights.with_name(FACTORS_NAME), factors, factors_digest.hex(), folder, like)
        other_tensors = {key: value for key, value in tensors.items() if key not in factors}
        other_tensors[DIGEST] = torch.tensor(list(factors_digest), dtype=torch.uint8)
        with replacing(weights) as temporary:
            save_file(other_tensors, str(temporary), metadata={"format": "pt"})


def join_factors(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors with the factors that they refer to; unchanged if `folder` does not have them."""
    expected = referenced_digest(tensors)
    factors = None if expected is None else _nearby_factors(folder, expected)
    if factors is None:
        return tensors
    device = tensors[DIGEST].device
    other_tensors = {key: value for key, value in tensors.items() if key != DIGEST}
    return other_tensors | {key: value.to(device) for key, value in factors.items()}


def _nearby_factors(folder: Path, expected: bytes) -> dict[str, Tensor] | None:
    """The A and B with this digest, from the folder's factor file or an adapter in a folder nearby, or None."""
    config = folder / CONFIG_NAME
    try:
        name = read_json(config).get("basis") if config.is_file() else None
    except ValueError:  # reported by whoever reads the configuration itself
        name = None
    places = [folder]
    if isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name:
        places += [folder.parent, folder.parent / name, folder / name]
    for place in places:
        file = place / FACTORS_NAME
        # The header's digest is compared first, which costs no hashing. Another run's file is not an error here: the
        # model may have the right factors already.
        if file.is_file() and recorded_digest(file) == expected.hex():
            factors = read_tensors(file)
            if digest(factors) != expected:
                raise ValueError(f"{file} is damaged: its A and B are not what the checkpoint was made with")
            return factors
        file = place / WEIGHTS_NAME
        if place != folder and file.is_file():
            factors = {key: value for key, value in read_tensors(file).items() if is_factor(key)}
            if factors and digest(factors) == expected:
                return factors
    return None


def missing_factors_error(folder: object = None) -> ValueError:
    """The error for a checkpoint whose factors were not found; to be raised by the caller."""
    where = f" in {folder}" if folder else ""
    return ValueError(
        f"this checkpoint holds R alone, and its {FACTORS_NAME} (A and B) was not found{where}: copy that file from "
        "any checkpoint of its run into the folder, and load it with PeftModel.from_pretrained or load_adapter"
    )


def is_factor(key: str) -> bool:
    return any(f".{factor}" in key for factor in FROZEN_FACTORS)


def referenced_digest(tensors: dict[str, Tensor]) -> bytes | None:
    """The digest of the A and B that a file's R belongs to; None if the file has them itself."""
    found = tensors.get(DIGEST)
    if found is not None and (found.dtype != torch.uint8 or found.shape != (32,)):
        raise ValueError(f"expected {DIGEST} of 32 bytes, got {list(found.shape)} in {found.dtype}: {AGAIN}")
    return None if found is None else bytes(found.tolist())


def digest(factors: dict[str, Tensor]) -> bytes:
    """SHA-256 over keys without PEFT's prefix, dtypes, shapes and bits; a ValueError for shards."""
    if any(hasattr(value, "device_mesh") for value in factors.values()):  # DTensors
        raise ValueError("expected whole A and B, got FSDP2's shards of them: add and load adapters before fully_shard")
    sha256 = hashlib.sha256()
    # Without the prefix, so that a file's tensors and those of a model's layers have the same digest.
    for key in sorted(factors):
        value = factors[key].detach().cpu().contiguous()
        sha256.update(f"{key.removeprefix(PEFT_PREFIX)} {value.dtype} {list(value.shape)}".encode())
        sha256.update(value.view(torch.uint8).numpy().data)  # as bytes: numpy has no bf16
    return sha256.digest()


def _link_or_write(
    target: Path, factors: dict[str, Tensor], hexadecimal: str, checkpoint: Path, like: Path | None
) -> None:
    """Create the factor file: a hard link to another folder's file with this digest, or a new file."""
    relative = target.relative_to(checkpoint)
    siblings: list[Path] = []
    with suppress(OSError):  # a parent that may not be listed
        siblings = [folder for folder in sorted(checkpoint.parent.iterdir()) if folder != checkpoint]
    files = (folder / relative for folder in ([like] if like is not None else []) + siblings)
    same = next((file for file in files if _has_factors(file, hexadecimal)), None)
    with replacing(target) as temporary:
        if same is None:
            # one metadata entry: safetensors writes several in an order that depends on the process
            save_file(factors, str(temporary), metadata={"digest": hexadecimal})
            return
        temporary.unlink()  # os.link does not overwrite
        try:
            os.link(same, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(same, temporary)


def _has_factors(file: Path, hexadecimal: str) -> bool:
    """True if a file can be read, and its factors have this digest, not only its header."""
    with suppress(OSError, ValueError):
        return recorded_digest(file) == hexadecimal and digest(read_tensors(file)).hex() == hexadecimal
    return False


def recorded_digest(file: Path) -> str | None:
    """The digest in the header of a factor file; None if there is none."""
    try:
        return safetensors_header(file)[1].get("digest")
    except (ValueError, OSError):
        return None
