"""`AdapterBank`: the R's of many adapters on one basis, added and removed by name, and served in one batch."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.adapter_file import read_config, read_cores
from ..compat.torch import unwrapped
from ..constants import BASE_ROW, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import (
    adapted_layers,
    digests,
    layers_with,
    refuse_more_than_factors,
    refuse_uninitialized,
)
from ..layers.weight_adapter import LoRASBWeight
from ..utils.precision import FLOATS


@dataclass
class LoadReport:
    """Result of `AdapterBank.load`: names of the loaded adapters, and name -> reason for those that failed."""

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def adapters_in(folder: Path) -> list[Path]:
    """The folders of adapters inside a folder (in a saved model, its further adapters), else the folder itself."""
    visible = (path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else ()
    inside = sorted(path for path in visible if path.is_dir())
    if (folder / WEIGHTS_NAME).is_file():
        # os.path.isfile is False, too, in a folder that may not be read; Path.is_file raises
        return [path for path in inside if os.path.isfile(path / WEIGHTS_NAME)] or [folder]
    return inside or [folder]


class Columns(NamedTuple):
    """Position of a layer's R in a row of the bank: r² numbers from `first`."""

    first: int
    r: int


class LayerCores:
    """One layer's part of a bank, as an attribute of that layer (`adapted_layer.StoredCores`)."""

    def __init__(self, bank: AdapterBank, columns: Columns) -> None:
        self.bank, self.basis, self.columns = bank, bank.basis, columns
        self._seen: tuple[Tensor, Tensor] | None = None  # storage and its view, replaced together

    def stack(self, device: torch.device) -> Tensor:
        """A view [capacity, r, r] on a device, renewed after the bank has grown or the model has moved."""
        whole, seen = self.bank.storage, self._seen
        if whole.device != device:
            whole = self.bank.move(device)
        if seen is None or seen[0] is not whole:
            first, r = self.columns
            seen = self._seen = whole, whole[:, first : first + r**2].unflatten(1, (r, r))
        return seen[1]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None: a bank belongs to its process, and a loaded model gets another."""
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, object]) -> LayerCores | None:
        """Copy for the copied model's bank; None for a layer that is copied without its model."""
        bank = copy.deepcopy(self.bank, memo)
        return None if bank is None else LayerCores(bank, self.columns)


# All R's of an adapter are a row of one tensor [capacity, Σ r²]; a layer's stack [capacity, r, r] is a view of its
# columns. So adding an adapter takes one copy, removing it none, and it needs Σ r² numbers.
class AdapterBank:
    """The R's of many adapters that share one A and B, resident on the model's device or waiting in host memory.

    Methods may be called from several threads: the adapters of a batch in progress stay in place.

        bank = lorasb.AdapterBank(model)  # on the A and B of adapter "default"
        bank.load("adapters/")  # one folder per adapter
        model.generate(**batch, adapter_names=["ada", "grace", "__base__"])

    Args:
        model: a model with an initialized adapter `basis`.
        basis: the adapter whose A and B all adapters of the bank share.
        dtype: dtype of the R's: fp32, or bf16 or fp16 for half the memory (rounds each entry by 2^-9 or 2^-12).
        block: number of adapters by which capacity grows.
        resident: most adapters on the device at a time; the least recently used ones wait in host memory. None: all.

    Raises:
        ValueError: no such adapter, it is not initialized, its layers are not all linears on one device, the model has
            a bank already, or `block` or `resident` is below 1.
        TypeError: any other dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        basis: str = "default",
        *,
        dtype: torch.dtype = torch.float32,
        block: int = 64,
        resident: int | None = None,
    ) -> None:
        model = unwrapped(model)
        _, layers = adapted_layers(model, basis)
        _check(layers, basis, dtype, block, resident)
        self.basis, self.block, self.resident = basis, block, resident
        self._model = weakref.ref(model)  # weak, as the layers refer to the bank
        self.columns: dict[str, Columns] = {}
        size = 0
        for name, layer in layers.items():
            self.columns[name] = Columns(size, layer.adapters[basis].r)
            size += layer.adapters[basis].r ** 2
        device = next(iter(layers.values())).base.device
        with torch.inference_mode(False):
            self.storage = torch.zeros((0, size), dtype=dtype, device=device)
        self.digests = digests(layers, basis)
        self._factors_dtype = next(iter(layers.values())).lorasb_A[basis].dtype
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free: list[int] = []
        self._waiting: dict[str, Tensor] = {}
        self._in_use: Counter[str] = Counter()
        self._lock = threading.RLock()
        for name, layer in layers.items():
            layer.stored_cores = LayerCores(self, self.columns[name])

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        """The model's layers that read from the bank, by name."""
        model = self._model()
        return {} if model is None else layers_with(model, self.basis)

    @property
    def names(self) -> list[str]:
        """Names of all adapters, on the device or in host memory."""
        with self._lock:
            return sorted((*self._slots, *self._waiting))

    @property
    def adapter_bytes(self) -> int:
        """Bytes that the R's of one adapter take."""
        return self.storage.shape[1] * self.storage.element_size()

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._slots or name in self._waiting

    def __len__(self) -> int:
        return len(self._slots) + len(self._waiting)

    def add(self, name: str, cores: Mapping[str, Tensor] | str | None = None) -> None:
        """Add or replace an adapter.

        Args:
            name: its name in `adapter_names`.
            cores: layer name -> R [r, r]; or the name of an adapter of the model with the same A and B, whose R's are
                copied; None: R = 0.

        Raises:
            ValueError: a name that is not a string or that an adapter of the model has; or an R is missing, has
                another shape or is not finite.
            RuntimeError: a batch in progress uses the adapter that would be replaced.
        """
        if not isinstance(name, str):
            raise ValueError(f"expected a string as the adapter's name, got {name!r}")
        if name == BASE_ROW or name in getattr(self._model(), "peft_config", ()):
            raise ValueError(f"the model itself has an adapter {name!r}: choose another name in the bank")
        if isinstance(cores, str):
            cores = self._of_model(cores)
        row = torch.zeros(self.storage.shape[1], dtype=self.storage.dtype) if cores is None else self._row(name, cores)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._refuse_in_use(name)
            if name in self._slots:
                self.storage[self._slots[name]] = row.to(self.storage.device)
            elif self._is_full():
                self._waiting[name] = row
            else:
                self._fill(name, row)

    def remove(self, name: str) -> None:
        """Remove an adapter: a KeyError if there is none, a RuntimeError if a batch in progress uses it."""
        with self._lock:
            self._refuse_in_use(name)
            if name in self._slots:
                self._free.append(self._slots.pop(name))
            elif self._waiting.pop(name, None) is None:
                raise KeyError(self._unknown([name]))

    def _refuse_in_use(self, name: str) -> None:
        if self._in_use[name]:
            raise RuntimeError(f"adapter {name!r} serves a batch at the moment: replace or remove it afterwards")

    def cores(self, name: str) -> dict[str, Tensor]:
        """Copies of an adapter's R [r, r] in host memory, by layer."""
        with self._lock:
            if name not in self:
                raise KeyError(self._unknown([name]))
            row = self.storage[self._slots[name]] if name in self._slots else self._waiting[name]
            row = row.detach().cpu().clone()
        return {layer: row[c.first : c.first + c.r**2].view(c.r, c.r) for layer, c in self.columns.items()}

    def load(self, *folders: str | Path, **named: str | Path) -> LoadReport:
        """Add or replace adapters from folders of one adapter, named after it, or of several; or from `name=folder`.

        Truncated files and adapters with other A and B are skipped and listed in the report.

        Raises:
            ValueError: two folders have the same name; no adapter is loaded.
        """
        report = LoadReport()
        found = [(one.name, one) for folder in folders for one in adapters_in(Path(os.path.abspath(folder)))]
        found += [(name, Path(os.path.abspath(folder))) for name, folder in named.items()]
        paths = dict(reversed(found))
        for name, path in found:
            if path != paths[name]:
                raise ValueError(f"two adapters are called {name!r}, {paths[name]} and {path}: load(other_name=folder)")
        with self._lock:
            self._reserve(len({*self.names, *paths}))
        layers, scalings = self.layers, self._scalings()
        if not layers:
            raise ValueError("the bank's model, or its basis, is gone: make another, AdapterBank(model)")
        dtype = next(iter(layers.values())).lorasb_A[self.basis].dtype
        if dtype != self._factors_dtype:  # the model was cast, so adapters it saves have other digests
            self.digests, self._factors_dtype = (*self.digests, *digests(layers, self.basis)), dtype
        for name, path in found:
            try:
                self.add(name, read_cores(path, read_config(path), self.digests, scalings))
                report.loaded.append(name)
            except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
                report.failed[name] = str(error)
        return report

    def move(self, device: torch.device) -> Tensor:
        """Move the resident R's to a device, which a model's layers do when the model has moved; return all of them."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.storage.device != device:
                self.storage = self.storage.to(device)
            return self.storage

    @contextmanager
    def serving(self, names: Sequence[str]) -> Iterator[list[int]]:
        """Yield the slots of these adapters, which stay in place inside the block; -1 for `__base__`.

        Raises:
            KeyError: the bank has no adapter of a name.
            ValueError: more adapters are in use at a time than may be resident.
        """
        distinct = list(dict.fromkeys(name for name in names if name != BASE_ROW))
        with self._lock:
            unknown = [name for name in distinct if name not in self]
            if unknown:
                raise KeyError(self._unknown(unknown))
            self._in_use.update(distinct)
        try:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                for name in distinct:
                    if name not in self._slots:
                        self._make_room()
                        self._fill(name, self._waiting[name])
                    self._slots.move_to_end(name)
                slots = [-1 if name == BASE_ROW else self._slots[name] for name in names]
            yield slots
        finally:
            with self._lock:
                self._in_use -= Counter(distinct)  # which drops names that no batch uses

    def detach(self) -> None:
        """Remove the bank from the model; a RuntimeError while a batch uses it."""
        with self._lock:
            if self._in_use:
                raise RuntimeError("the bank serves a batch at the moment: detach it afterwards")
            for layer in self.layers.values():
                if getattr(layer.stored_cores, "bank", None) is self:  # another bank stays
                    layer.stored_cores = None

    def __deepcopy__(self, memo: dict[int, object]) -> AdapterBank | None:
        """Copy for the copied model; None if a layer is copied without its model."""
        model = memo.get(id(self._model()))
        if not isinstance(model, nn.Module):
            return None
        memo[id(self)] = new = object.__new__(AdapterBank)
        with self._lock:
            kept = {name: value for name, value in vars(self).items() if name not in ("_lock", "_model", "_in_use")}
            vars(new).update({name: copy.deepcopy(value, memo) for name, value in kept.items()})
        new._model, new._lock, new._in_use = weakref.ref(model), threading.RLock(), Counter()
        return new

    def _is_full(self) -> bool:
        return self.resident is not None and len(self._slots) >= self.resident

    def _make_room(self) -> None:
        """Move the least recently used idle adapter to host memory if all resident slots are taken."""
        if not self._is_full():
            return
        name = next((name for name in self._slots if not self._in_use[name]), None)
        if name is None:
            raise ValueError(
                f"all {self.resident} resident adapters are in use: expected AdapterBank(resident=...) of at least the "
                "number of different adapters in the batches that run at the same time"
            )
        slot = self._slots.pop(name)
        self._waiting[name] = self.storage[slot].detach().cpu().clone()
        self._free.append(slot)

    def _fill(self, name: str, row: Tensor) -> None:
        if not self._free:
            self._reserve(len(self.storage) + self.block)
        slot = self._free.pop()
        self.storage[slot] = row.to(self.storage.device)
        self._slots[name] = slot
        self._waiting.pop(name, None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _reserve(self, capacity: int) -> None:
        """Grow the capacity to this many adapters or more, in whole blocks; adapters keep their slots."""
        old = len(self.storage)
        capacity = -(-capacity // self.block) * self.block
        capacity = capacity if self.resident is None else min(capacity, self.resident)
        if capacity <= old:
            return
        larger = zeros_in_huge_pages(capacity, self.storage.shape[1], self.storage.dtype, self.storage.device)
        larger[:old] = self.storage
        self.storage = larger  # a batch in progress continues with the old one, whose rows are the same
        self._free = [*range(capacity - 1, old - 1, -1), *self._free]

    @torch.no_grad()
    def _row(self, name: str, cores: Mapping[str, Tensor]) -> Tensor:
        """The R's of all layers, concatenated, in host memory and the bank's dtype."""
        for layer, (_, r) in self.columns.items():
            core = cores.get(layer)
            if core is None or core.shape != (r, r) or core.dtype not in FLOATS:
                got = "nothing" if core is None else f"{list(core.shape)} in {core.dtype}"
                raise ValueError(f"adapter {name!r}: expected R [{r}, {r}] of layer {layer!r}, got {got}")
        # one copy: two hundred small copies take a millisecond, and two hundred views half of that
        parts, one_rank = [cores[layer] for layer in self.columns], len({c.r for c in self.columns.values()}) == 1
        joined = torch.cat(parts if one_rank else [core.reshape(-1) for core in parts])
        row = joined.reshape(-1).to("cpu", self.storage.dtype)
        if not (math.isfinite(row.sum()) or row.isfinite().all()):  # one quick pass: NaN and Inf reach the sum
            raise ValueError(f"adapter {name!r} has NaN or Inf values: its training had failed")
        return row

    def _scalings(self) -> dict[str, float]:
        """The original s of the basis by layer, by which the R's of the bank are multiplied; not `set_scale`'s."""
        return {name: layer.adapters[self.basis].made_with for name, layer in self.layers.items()}

    def _of_model(self, adapter: str) -> dict[str, Tensor]:
        layers = self.layers
        for layer in layers.values():
            if adapter not in layer.lorasb_R or layer.lorasb_A[adapter] is not layer.lorasb_A[self.basis]:
                raise ValueError(f"expected an adapter of the model on the A and B of {self.basis!r}, got {adapter!r}")
        if adapter != self.basis:
            refuse_more_than_factors(self._model(), adapter, "serve it by its name")
        found, scalings = {}, self._scalings()
        for name, layer in layers.items():
            ratio = layer.adapters[adapter].scaling / scalings[name]
            found[name] = layer.lorasb_R[adapter] if ratio == 1.0 else layer.lorasb_R[adapter] * ratio
        return found

    def _unknown(self, names: Sequence[str]) -> str:
        shown = ", ".join(map(repr, names[:3]))
        return f"no adapter {shown} in the bank, which has {len(self)}: bank.load(folder) or bank.add(name)"


def bank_of(modules: Iterable[nn.Module]) -> AdapterBank | None:
    """The bank that these modules' layers read from, or None."""
    layers = (module for module in modules if isinstance(module, AdaptedLayer))
    return next((layer.stored_cores.bank for layer in layers if isinstance(layer.stored_cores, LayerCores)), None)


def _check(layers: dict[str, AdaptedLayer], basis: str, dtype: torch.dtype, block: int, resident: int | None) -> None:
    other = next((name for name, layer in layers.items() if isinstance(layer, LoRASBWeight)), None)
    if other is not None:
        raise ValueError(f"a bank serves linears, and adapter {basis!r} adapts {other!r}: name it in exclude_modules")
    refuse_uninitialized(layers, basis)
    devices = {layer.base.device for layer in layers.values()}
    if len(devices) > 1:
        raise ValueError(f"expected all layers on one device, got {', '.join(map(str, sorted(devices, key=str)))}")
    if any(layer.stored_cores is not None for layer in layers.values()):
        raise ValueError("the model has a bank: use that one, or bank.detach() first")
    if dtype not in FLOATS or dtype == torch.float64:
        raise TypeError(f"expected dtype fp32, bf16 or fp16, got {dtype}")
    if block < 1 or (resident is not None and resident < 1):
        raise ValueError(f"expected block and resident of 1 or more, got {block} and {resident}")


# Reading 64 pieces of 8 KB (spread over 1.7 GB) once each took 1.2 times as long with 4 KB pages on two Zen 5 cores and
# up to 4.7 times as long on two Zen 3 cores, where the first write to such pages also takes 4 times as long.
LEAST_HUGE = 1 << 22  # bytes; smaller tensors come from torch's allocator


def zeros_in_huge_pages(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [rows, columns]; on a CPU, in 2 MB pages if the system has them, allocated on the first write."""
    count = rows * columns
    size = count * torch.empty((), dtype=dtype).element_size()
    if device.type != "cpu" or size < LEAST_HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros((rows, columns), dtype=dtype, device=device)
    # private: shared memory, the default, has huge pages on few systems (shmem_enabled)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zero; freed with the last tensor on it
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(rows, columns)
