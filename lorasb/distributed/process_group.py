"""Collectives over torch.distributed's default group, no-ops in a single process, which raise errors on every rank; and
A and B under sharding: restored where FSDP resumes from R alone, gathered where DeepSpeed ZeRO-3 saves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.adapter_file import check_tensors, group_by_layer, read_tensors
from ..compat.accelerate import is_managed, is_partitioned
from ..constants import FROZEN_FACTORS, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer


class Processes:
    """torch.distributed's default group, or a single process where none is initialized.

    All methods that communicate are collectives: every rank has to call them, in the same order.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def _device(self) -> torch.device:
        """The device that the backend communicates from: NCCL takes CUDA tensors only, gloo takes them on the CPU."""
        nccl = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _buffer(self, tensor: Tensor) -> Tensor:
        device = self._device()
        return (tensor if tensor.device.type == device.type else tensor.to(device)).contiguous()

    def _gathered(self, local: Tensor) -> list[Tensor]:
        """The tensors of all ranks on the CPU, by rank; the shape has to be the same on every rank."""
        local = local.to(self._device())
        gathered = [torch.zeros_like(local) for _ in range(self.world_size)]
        dist.all_gather(gathered, local)
        return [part.cpu() for part in gathered]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Σ over ranks, bitwise equal on every rank. May overwrite `tensor`."""
        if not self.is_distributed:
            return tensor
        buffer = self._buffer(tensor)
        dist.all_reduce(buffer)
        return buffer.to(tensor.device)

    def all_gather(self, value: int) -> list[int]:
        """The value of every rank, by rank."""
        return [int(number) for number in self._gathered(torch.tensor([value]))] if self.is_distributed else [value]

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Elementwise maximum over ranks, so that decisions based on it are the same on every rank."""
        if not self.is_distributed:
            return values
        # fp64: byte counts have to stay exact, and in fp32 they would not beyond 2^24.
        reduced = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced.tolist()

    def gather_json(self, value: object) -> list[Any]:
        """The JSON values of all ranks, by rank."""
        if not self.is_distributed:
            return [value]
        text = json.dumps(value).encode()
        text = text.ljust(max(self.all_gather(len(text))))  # equal lengths: JSON ignores spaces
        parts = self._gathered(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return [json.loads(bytes(part.numpy())) for part in parts]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Rank `owner`'s tensor; every rank passes one of the same shape and dtype. May overwrite `tensor`."""
        if not self.is_distributed:
            return tensor
        buffer = self._buffer(tensor)
        dist.broadcast(buffer, owner)
        return buffer.to(tensor.device)

    def broadcast_any_batch(self, batch: dict[str, object] | None) -> dict[str, object] | None:
        """The tensors of a batch from the lowest rank that has one; None if no rank has."""
        tensors = {name: t.cpu() for name, t in (batch or {}).items() if isinstance(t, Tensor)}
        # Receivers have to allocate buffers first: names, shapes and dtypes go ahead.
        specs = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}
        every = self.gather_json(specs if batch is not None else None)
        owner = next((rank for rank, found in enumerate(every) if found is not None), None)
        if owner is None:
            return None
        if self.rank != owner:
            tensors = {name: torch.zeros(shape, dtype=getattr(torch, t)) for name, (shape, t) in every[owner].items()}
        return {name: self.broadcast(tensor, owner) for name, tensor in tensors.items()}

    @contextmanager
    def together(self, doing: str = "initialization") -> Iterator[None]:
        """Run a block that may fail on some ranks, between collectives: its error is raised on every rank."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_on_every_rank(error, doing)

    def raise_on_every_rank(self, error: BaseException | None, doing: str = "initialization") -> None:
        """Raise `error` where there is one, and a RuntimeError on the ranks that have none."""
        if self.is_distributed:  # a rank that continued alone would wait in the next collective forever
            failed = [rank for rank, bad in enumerate(self.all_gather(int(error is not None))) if bad]
            if failed and error is None:
                raise RuntimeError(f"{doing} failed on rank {failed[0]} (see its log); the model is unchanged")
        if error is not None:
            raise error

    def common_hash(self, digest: str) -> str:
        """SHA-256 over the hex digests of all ranks; a single process's own digest unchanged."""
        if not self.is_distributed:
            return digest
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.gather_json(digest)))).hexdigest()


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded value of a tensor; a collective where FSDP2 has made it a DTensor."""
    value: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return value.detach()


def sharded(model: nn.Module) -> bool:
    """True if a parameter is a DTensor (FSDP2): a forward then all-gathers, so every rank has to run the same ones."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


# Copies of A and B in host memory of the rank that saves. Gathering a partitioned parameter is a collective, but a
# state dict is built on one rank only, so the copies are made beforehand. Weak keys: copies are freed with their layer.
_factor_copies: WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]] = WeakKeyDictionary()


def keep_factors(layers: Mapping[str, AdaptedLayer], name: str, first: bool) -> None:
    """Copy A and B to host memory of the `first` rank for later saves; a collective that every rank has to call."""
    for layer in layers.values():
        frozen = {factor: getattr(layer, factor)[name] for factor in FROZEN_FACTORS}
        if any(is_partitioned(p) for p in frozen.values()):
            import deepspeed

            # One layer at a time: no rank ever holds the gathered factors of all layers on its GPU.
            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                if first:
                    # `clone`: on a CPU run `cpu()` is no copy, and ZeRO frees the storage when the block is left.
                    gathered = {factor: p.detach().cpu().clone() for factor, p in frozen.items()}
                    _factor_copies.setdefault(layer, {})[name] = gathered


def with_kept_factors(tensors: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """Add the A and B that ZeRO-3 omitted to an adapter's state dict; a ValueError without `keep_factors`."""
    complete = dict(tensors)
    for key in tensors:
        path, separator, _ = key.partition(".lorasb_R")
        layer = model.get_submodule(path) if separator else None
        if not isinstance(layer, AdaptedLayer):
            continue
        for factor in FROZEN_FACTORS:
            parameter: Tensor = getattr(layer, factor)[name]
            if not is_managed(parameter):  # without ZeRO the state dict has A and B already
                continue
            copies = _factor_copies.get(layer, {})
            if is_partitioned(parameter) and name not in copies:
                raise ValueError(
                    f"A and B of {path} are partitioned by ZeRO-3, and saving gathers only what is "
                    "trained: keep lorasb.InitCallback() among the Trainer's callbacks, which gathers them"
                )
            value = copies[name][factor] if is_partitioned(parameter) else parameter.detach()
            complete[key.replace(".lorasb_R", f".{factor}")] = value
    return complete


def restore_factors(layers: dict[str, AdaptedLayer], name: str, folders: Iterable[Path]) -> bool:
    """Load A and B from the first saved adapter with the layers' R; True if found. A collective: rank 0 reads files."""
    processes = Processes()
    # Before the files are read, and on every rank: gathering a sharded R is a collective.
    cores = {layer: full_tensor(module.lorasb_R[name]) for layer, module in layers.items()}
    with processes.together("resuming"):
        saved = _read_matching(layers, name, cores, folders) if processes.rank == 0 else None
    if not processes.all_gather(int(saved is not None))[0]:
        return False
    for layer, module in layers.items():
        frozen = {}
        for factor in FROZEN_FACTORS:
            # A broadcast needs one dtype and shape on all ranks, and the file may have been saved in another dtype.
            buffer = torch.empty(module.shapes(name)[factor], dtype=getattr(module, factor)[name].dtype)
            frozen[factor] = processes.broadcast(saved[layer][factor].to(buffer.dtype) if saved else buffer, 0)
        module.set_factors(name, frozen["lorasb_B"], cores[layer], frozen["lorasb_A"])
    return True


def _read_matching(
    layers: dict[str, AdaptedLayer], name: str, cores: dict[str, Tensor], folders: Iterable[Path]
) -> dict[str, dict[str, Tensor]] | None:
    """Factors by layer from the first folder whose R equals `cores`, with shapes and finiteness checked."""
    for checkpoint in folders:
        folder = checkpoint if name == "default" else checkpoint / name  # PEFT saves other names in a subfolder
        if not (folder / WEIGHTS_NAME).is_file():
            continue
        tensors = read_tensors(folder)
        saved = group_by_layer(tensors)
        # Bitwise equality of R identifies the adapter: A and B of another run would give a wrong model silently.
        if all(layer in saved and torch.equal(saved[layer]["lorasb_R"], core.cpu()) for layer, core in cores.items()):
            check_tensors(tensors, {layer: module.shapes(name) for layer, module in layers.items()})
            return saved
    return None
