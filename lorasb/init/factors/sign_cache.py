"""Signs of all layers on disk, so that another rank needs no backward; and an interrupted run's finished blocks.

One safetensors file: the words of every layer, the energies of G that the first pass measured, and a key. Beside it, a
folder with `.partial` added to its name while a layerwise run is under way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.atomic_files import replacing, safetensors_header, write_json
from ..gradients.block_recorder import Traversal
from ..linalg.sign_bits import NONZERO, WORDS, SignBits

FORMAT = "lorasb signs 1"
CURVE = "curve"
OF_THE_DATA = ("num_samples", "data", "loss_fn")  # not compared where no batches are given


@dataclass(frozen=True)
class CachedGradient:
    """A layer's signs, and what was measured of G while it existed."""

    bits: SignBits
    squares: float
    zeros: int
    energies: Tensor

    def signs(self) -> SignBits:
        """sign(G)."""
        return self.bits

    def value(self) -> Tensor:
        """A cache has no values.

        Raises:
            ValueError: always.
        """
        raise ValueError("update='sgd' needs the gradient itself, and a cache keeps its signs only: leave cache out")

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """The energies of the first pass, as far as its rank went."""
        return self.energies

    def half_signs(self) -> None:
        """Not kept."""
        return


class Cache:
    """The cache at a path: what is there, and what is being made.

    Args:
        path: of the safetensors file.
        key: what the signs depend on, by field.
        data: whether the key says which data there is.
    """

    def __init__(self, path: str | os.PathLike[str], key: Mapping[str, Any], data: bool) -> None:
        self.path, self.key, self.data = Path(path), json.loads(json.dumps(dict(key))), data
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.facts: dict[str, Any] = {}
        self.course: list[Any] = []  # of a layerwise run: blocks, targets and whether halves are compared
        self._found: dict[str, CachedGradient] = {}
        self._pending: list[str] = []

    def load(self, names: list[str]) -> dict[str, CachedGradient] | None:
        """The layers of a finished cache, or None where there is no file.

        Raises:
            ValueError: the file is damaged, made from something else (the field is named), or lacks a layer.
        """
        if self.path.is_dir():
            raise ValueError(f"expected a file for cache=, got the folder {self.path}: name a file in it")
        if not self.path.exists():
            return None
        found, key, self.facts = read(self.path)
        self._compare(key, self.path)
        missing = [name for name in names if name not in found and name not in self.facts["not_reached"]]
        if missing:
            raise ValueError(
                f"the cache {self.path} has no layer {missing[0]!r} ({len(missing)} are missing): it was made "
                "for fewer target_modules. Choose another cache=, or delete the file to make it again"
            )
        return {name: found[name] for name in names if name in found}

    def add(self, name: str, gradient: CachedGradient) -> None:
        """Take in a layer."""
        self._found[name] = gradient
        self._pending.append(name)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the file, atomically, and remove what was partial."""
        write(self.path, self._found, self.key, facts)
        shutil.rmtree(self.partial, ignore_errors=True)

    def resume(self, traversals: list[Traversal]) -> int | None:
        """Take in the finished blocks of an interrupted run; see `layerwise.Progress`.

        Raises:
            ValueError: the interrupted run was another one.
        """
        boundary = self.partial / "boundary.safetensors"
        if not boundary.exists():
            return None
        mine = self.key | {"blocks, targets and halves": self.course}
        self._compare(json.loads((self.partial / "key.json").read_text(encoding="utf-8")), self.partial, mine)
        safetensors_header(boundary)
        with safe_open(str(boundary), "pt") as file:
            block = int(file.metadata()["block"])
            gradients = [file.get_tensor(str(k)) for k in range(len(traversals))]
        for path in sorted(self.partial.glob("block-*.safetensors")):
            if int(path.stem.partition("-")[2]) > block:
                self._found |= read(path)[0]
        for traversal, gradient in zip(traversals, gradients, strict=True):
            if traversal.gradient is not None:
                traversal.gradient = gradient.to(traversal.gradient.device)
        return block

    def finished(self, block: int, traversals: list[Traversal]) -> None:
        """Write a block's signs, then the gradients at its input: only then does the block count as finished."""
        write_json(self.partial / "key.json", self.key | {"blocks, targets and halves": self.course})
        layers = {name: self._found[name] for name in self._pending}
        write(self.partial / f"block-{block:05d}.safetensors", layers, self.key, {})
        self._pending = []
        gradients = {str(k): t.gradient.cpu().contiguous() for k, t in enumerate(traversals) if t.gradient is not None}
        with replacing(self.partial / "boundary.safetensors") as temporary:
            save_file(gradients, str(temporary), metadata={"block": str(block - 1)})

    @property
    def layers(self) -> dict[str, CachedGradient]:
        """What is there so far."""
        return self._found

    def _compare(self, other: Mapping[str, Any], where: Path, key: Mapping[str, Any] | None = None) -> None:
        key = key or self.key
        for field in dict.fromkeys([*key, *other]):
            if not self.data and field in OF_THE_DATA:
                continue
            mine, theirs = key.get(field), other.get(field)
            if mine != theirs:
                raise ValueError(
                    f"the cache {where} does not fit: its {field} is {_shown(theirs)}, expected {_shown(mine)}. "
                    "Choose another cache=, or delete it to make it again"
                )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, CachedGradient], dict[str, Any], dict[str, Any]]:
    """Layers, key and facts of a cache file.

    Raises:
        ValueError: another kind of file, or a truncated one.
    """
    metadata = safetensors_header(path).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no cache of lorasb's initialization: expected {FORMAT!r} in its header")
    about = json.loads(metadata["layers"])
    found = {}
    with safe_open(str(path), "pt") as file:
        for name, facts in about.items():
            nonzero = file.get_tensor(f"{name}:{NONZERO}") if facts["zeros"] else None
            bits = SignBits(file.get_tensor(f"{name}:{WORDS}"), tuple(facts["shape"]), nonzero)
            found[name] = CachedGradient(bits, facts["squares"], facts["zeros"], file.get_tensor(f"{name}:{CURVE}"))
    return found, json.loads(metadata["key"]), json.loads(metadata["facts"])


def write(
    path: str | os.PathLike[str],
    layers: Mapping[str, CachedGradient],
    key: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write a cache file, atomically."""
    tensors: dict[str, Tensor] = {}
    about = {}
    for name, layer in layers.items():
        tensors[f"{name}:{WORDS}"], tensors[f"{name}:{CURVE}"] = layer.bits.words, layer.energies
        if layer.bits.nonzero is not None:
            tensors[f"{name}:{NONZERO}"] = layer.bits.nonzero
        about[name] = {"shape": layer.bits.shape, "squares": layer.squares, "zeros": layer.zeros}
    metadata = {
        "format": FORMAT,
        "layers": json.dumps(about),
        "key": json.dumps(dict(key)),
        "facts": json.dumps(dict(facts)),
    }
    with replacing(path) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, str(temporary), metadata=metadata)


def cached(gradient: Any, of_grad: Tensor) -> CachedGradient:
    """What a cache keeps of a sum: signs on the host, and the energies just measured."""
    known = of_grad[~of_grad.isnan()].to(torch.float64)
    return CachedGradient(gradient.signs().to("cpu"), gradient.squares, gradient.zeros, known)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
