"""Cache all layers' signs on disk, so that another rank r needs no backward and an interrupted run can resume.

One safetensors file holds the packed signs of every layer, the energies of G measured when it was made, and a key that
identifies model, data and versions. While a layerwise run is in progress, a folder next to it (`.partial` appended to
its name) holds the finished blocks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CellType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..constants import VERSION
from ..distributed.process_group import full_tensor
from ..utils.atomic_files import replacing, write_json
from ..utils.reading import AGAIN, Json, read_json, read_tensors, safetensors_header
from .accumulator import GradientSigns
from .block_recorder import Traversal
from .svd import SignBits
from .task import InitOptions, Layers

FORMAT = "lorasb signs 1"  # in the header; increase the number if the layout changes
WORDS, NONZERO, CURVE = "words", "nonzero", "curve"  # names of a layer's tensors
SIGNS_SINCE = "0.1.0"  # the first version whose signs are bitwise equal to this one's: its caches are still valid
HASHED_VALUES = 64  # values per weight, evenly spaced, in the hash of a model


@dataclass(frozen=True)
class CachedGradient(GradientSigns):
    """A layer's signs, with the measurements that need G's values."""

    energies: Tensor  # ‖U_kᵀ G V_k‖² for k = 1, 2, ..., up to the rank that the cache was made at

    def signs(self) -> GradientSigns:
        """sign(G)."""
        return self

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """Return the stored energies, which were measured in the subspaces that `u` and `vt` span: both are ignored."""
        return self.energies


class Cache:
    """The cache of one initialization: loads a finished file, whose key must match, or collects layers for one."""

    def __init__(self, path: str | os.PathLike[str], key: Json) -> None:
        self.path, self.key = Path(path), key
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.facts: Json = {}
        self.partial_key: Json = {}  # `key` plus a layerwise run's blocks and targets: must match to resume
        self.layers: dict[str, CachedGradient] = {}  # added or loaded so far

    def load(self, names: list[str]) -> dict[str, CachedGradient] | None:
        """Return the layers of a finished cache, or None if there is no file."""
        if self.path.is_dir():
            raise ValueError(f"expected a file for cache=, got the folder {self.path}: name a file in it")
        if not self.path.exists():
            return None
        with _advising_to_delete(self.path):
            layers, key, self.facts = read(self.path)
        self._compare(key, self.path, self.key)
        # Layers that no sample reached have no signs; their absence does not invalidate the cache.
        missing = [name for name in names if name not in layers and name not in self.facts["not_reached"]]
        if missing:
            raise ValueError(
                f"the cache {self.path} has no layer {missing[0]!r} ({len(missing)} are missing): it was made "
                "for fewer target_modules. Choose another cache=, or delete the file to make it again"
            )
        return {name: layers[name] for name in names if name in layers}

    def add(self, name: str, signs: GradientSigns, energies: list[float]) -> None:
        """Add a layer's signs and its measured energies."""
        measured = torch.tensor(energies, dtype=torch.float64)
        self.layers[name] = CachedGradient(signs.bits.to("cpu"), signs.squares, signs.zeros, signs.finite, measured)

    def finish(self, facts: Json) -> None:
        """Write the file atomically, then remove the `.partial` folder."""
        write(self.path, self.layers, self.key, facts)
        shutil.rmtree(self.partial, ignore_errors=True)

    def resume(self, traversals: list[Traversal], blocks: int) -> int | None:
        """Load an interrupted run's finished blocks and gradients of `traversals`; return the next block, or None."""
        boundary = self.partial / "boundary.safetensors"
        if not boundary.exists():
            return None
        self._compare(read_json(self.partial / "key.json"), self.partial, self.partial_key)
        with _advising_to_delete(self.partial):
            block, gradients = int(safetensors_header(boundary)[1]["block"]), read_tensors(boundary)
            # A block whose boundary was not written in time is recomputed, and its file overwritten.
            for i in range(block + 1, blocks):
                self.layers |= read(self._file_of(i))[0]
        # Traversals were recorded again by this run; only their gradients come from the file.
        for k, traversal in enumerate(traversals):
            if traversal.gradient is not None:
                traversal.gradient = gradients[str(k)].to(traversal.gradient.device)
        return block

    def finished(self, block: int, names: Iterable[str], traversals: list[Traversal]) -> None:
        """Write a block's signs, then the gradients at its input."""
        # The boundary file is the commit: it is replaced atomically and names the next block, so a run that is
        # interrupted between the two writes resumes at this block.
        write_json(self.partial / "key.json", self.partial_key)
        layers = {name: self.layers[name] for name in names if name in self.layers}
        write(self._file_of(block), layers, self.key, {})
        # `contiguous`: safetensors refuses views.
        gradients = {str(k): t.gradient.cpu().contiguous() for k, t in enumerate(traversals) if t.gradient is not None}
        with replacing(self.partial / "boundary.safetensors") as temporary:
            save_file(gradients, str(temporary), metadata={"block": str(block - 1)})

    def _file_of(self, block: int) -> Path:
        return self.partial / f"block-{block:05d}.safetensors"

    def _compare(self, other: Json, where: Path, key: Json) -> None:
        """Raise a ValueError that names the first field in which a stored key differs from `key`."""
        for field in key:
            if key[field] != other.get(field):
                stored, expected = (_short(json.dumps(one.get(field))) for one in (other, key))
                raise ValueError(
                    f"the cache {where} does not fit: its {field} is {stored}, expected {expected}. Choose another "
                    "cache=, or delete it to make it again"
                )


def uncut_of(path: str | os.PathLike[str] | None) -> int | None:
    """Return how many blocks a cache's interrupted run left uncut (`plan.uncut_blocks`), or None without such a run."""
    folder = Path(f"{path}.partial")
    if path is None or not (folder / "boundary.safetensors").is_file() or not (folder / "key.json").is_file():
        return None
    return int(read_json(folder / "key.json").get("uncut blocks", 0))


@contextmanager
def _advising_to_delete(path: Path) -> Iterator[None]:
    """Replace the advice in errors about unreadable and missing files: a cache can be made again."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).removesuffix(f": {AGAIN}")
        raise ValueError(f"the cache cannot be used ({reason}): delete {path} to make it again") from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, CachedGradient], Json, Json]:
    """Return the layers (by name), key and facts (loss, number of samples, ...) of a cache file."""
    _, metadata = safetensors_header(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no cache of lorasb's initialization: expected {FORMAT!r} in its header")
    layers, tensors = {}, read_tensors(path)
    for name, values in json.loads(metadata["layers"]).items():
        # The bits of nonzero entries are written only if G had zeros.
        bits = SignBits(tensors[f"{name}:{WORDS}"], tuple(values["shape"]), tensors.get(f"{name}:{NONZERO}"))
        layers[name] = CachedGradient(bits, values["squares"], values["zeros"], True, tensors[f"{name}:{CURVE}"])
    return layers, json.loads(metadata["key"]), json.loads(metadata["facts"])


def write(path: Path, layers: Mapping[str, CachedGradient], key: Json, facts: Json) -> None:
    """Write a cache file atomically."""
    scalars: Json = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        scalars[name] = {"shape": layer.bits.shape, "squares": layer.squares, "zeros": layer.zeros}
        tensors |= {f"{name}:{WORDS}": layer.bits.words, f"{name}:{CURVE}": layer.energies}
        if layer.bits.nonzero is not None:
            tensors[f"{name}:{NONZERO}"] = layer.bits.nonzero
    metadata = {"layers": scalars, "key": key, "facts": facts}
    texts = {"format": FORMAT} | {name: json.dumps(value) for name, value in metadata.items()}
    with replacing(path) as temporary:
        save_file({n: tensor.cpu().contiguous() for n, tensor in tensors.items()}, str(temporary), metadata=texts)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    own = {"lorasb": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in ("transformers", "peft")}


def cache_key(model: nn.Module, layers: Layers, options: InitOptions, seen: int, data: str | None) -> dict[str, object]:
    """Return everything that a model's signs depend on, by field; a mismatch is reported by field name."""
    # The rank and η are not part of it: any adapter can be initialized from the same signs.
    return {
        "dtype": str(next(iter(layers.values())).base.dtype).removeprefix("torch."),
        "base weights": weights_hash(model),
        "update": options.update,
        "seed": options.seed,
        **({} if data is None else {"num_samples": seen, "data": data, "loss_fn": _describe_loss(options.loss_fn)}),
        "versions": versions() | {"lorasb": SIGNS_SINCE},
    }


def _describe_loss(loss: Any) -> str | None:
    """Return a loss's name, with numbers and strings bound by a partial, closure or object; without its code."""
    if loss is None:
        return None
    function = getattr(loss, "func", loss)  # unwraps a partial
    code = getattr(function, "__code__", None)
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    if code is None:  # an object: names that begin with _ belong to Python or torch
        held = {key: value for key, value in getattr(function, "__dict__", {}).items() if key[0] != "_"}
        held.pop("training", None)  # set on modules; the loss is the same in both modes
    else:
        held = dict(zip(code.co_freevars, map(_content, getattr(function, "__closure__", None) or ()), strict=True))
    if name.endswith("<lambda>") and code is not None:  # tells lambdas apart
        name += f", {Path(code.co_filename).name}, line {code.co_firstlineno}"
    held |= getattr(loss, "keywords", {}) | {str(i): value for i, value in enumerate(getattr(loss, "args", ()))}
    shown = {k: v if isinstance(v, str | int | float | None) else type(v).__qualname__ for k, v in held.items()}
    return f"{name} with {json.dumps(shown, sort_keys=True)}" if shown else name


def _content(cell: CellType) -> object:
    """Return the value of a closure's variable, or None if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of every base weight's name, shape, dtype and 64 values (no values if offloaded)."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lorasb_" in name:
            continue
        # Adapting a layer renames its weight; the hash should not depend on which layers are adapted.
        digest.update(f"{name.replace('.base_layer', '')} {list(weight.shape)} {weight.dtype}".encode())
        for full in _plain_tensors(weight):
            flat = full.reshape(-1)
            # fp64: fp32 cannot represent the indices of large weights
            indices = torch.linspace(0, flat.numel() - 1, HASHED_VALUES, dtype=torch.float64).long().to(flat.device)
            digest.update(flat[indices].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(weight: Tensor) -> list[Tensor]:
    """Return the unsharded weight (a collective under FSDP2), or a quantized weight's tensors; none on meta."""
    if weight.is_meta:
        return []
    data = full_tensor(weight).data
    parts = [data]
    if is_traceable_wrapper_subclass(data):
        parts = [getattr(data, name) for name in data.__tensor_flatten__()[0]]
    return [part for part in parts if part.numel()]
