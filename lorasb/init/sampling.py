"""Which samples initialization sees: drawn by seed where the data can be indexed, in order where it cannot."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from ..distributed.process_group import Processes

Batch = dict[str, Any]
SHARE = 1000  # the paper takes 1/1000 of the data set (appendix I)
LEAST = 32


@dataclass
class Samples:
    """Batches to iterate over once, and what was seen: the number of samples and a hash of their tensors.

    `several`: other processes have shares of their own, so that an empty or short one is no error.
    """

    batches: Iterable[Batch]
    limit: int | None = None  # take this many in order, where the data could not be drawn beforehand
    exact: bool = True  # whether fewer than `limit` is an error
    several: bool = False
    seen: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[Batch]:
        if self.limit == 0:
            return
        for batch in self.batches:
            _check_batch(batch)
            rows = batch_size(batch)
            if self.limit is not None and self.seen + rows > self.limit:
                rows = self.limit - self.seen
                batch = take_rows(batch, torch.arange(rows))
            if rows == 0:
                continue
            self.seen += rows
            self._update_hash(batch)
            yield dict(batch)
            if self.limit is not None and self.seen >= self.limit:
                break
        if not self.several:
            self.check_enough(self.seen)

    def _update_hash(self, batch: Mapping[str, Any]) -> None:
        for name in sorted(batch):
            if isinstance(batch[name], Tensor):
                self._hash.update(name.encode())
                self._hash.update(batch[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def check_enough(self, found: int) -> None:
        """Raise a ValueError where there is nothing, or less than was asked for."""
        if found == 0:
            raise ValueError("expected at least one sample to initialize from, got none: the batches are empty")
        if self.exact and self.limit is not None and found < self.limit:
            raise ValueError(_too_few(self.limit, found))

    @property
    def data_hash(self) -> str:
        """SHA-256 of the samples' tensors, in the order seen."""
        return str(self._hash.hexdigest())


def select(batches: Any, num_samples: int | None, seed: int, processes: Processes | None = None) -> Samples:
    """Choose samples from a DataLoader (by its data set), a list of batches (by their rows) or any iterable (in order).

    Args:
        batches: a DataLoader, a list of dicts of tensors, or an iterable of such dicts. A DataLoader with a sampler of
            its own (a subset, a rank's share) is taken in its order.
        num_samples: how many; None means min(available, max(32, n/1000)), or all of an iterable without a size.
            Both count all processes, each of which passes the batches of its own share.
        seed: seed of the drawing. The global random state is not touched.
        processes: who else there is.

    Raises:
        ValueError: fewer samples than asked for (both numbers are named), or none.
        TypeError: a batch that is no mapping.
    """
    processes = processes or Processes()
    count, error = -1, None
    try:
        count = _countable(batches, num_samples)
    except (TypeError, ValueError) as caught:
        error = caught
    processes.raise_on_every_rank(error)
    counts = processes.all_gather(count)
    if min(counts) >= 0:  # everybody's samples can be drawn from
        chosen = _draw(counts, num_samples, seed, processes.rank)
        drawn = _drawn_from_dataset(batches, chosen) if _can_draw(batches) else _drawn_from_list(batches, chosen)
        return Samples(drawn, several=processes.is_distributed)
    lengths = processes.all_gather(_length(batches))
    exact = num_samples is not None or min(lengths) < 0
    limit = num_samples if exact else _default_count(sum(lengths))
    return Samples(without_repeats(batches), limit=limit, exact=exact, several=processes.is_distributed)


def _length(batches: Any) -> int:
    """How many samples come in a process's own order; -1 where nobody knows."""
    total: Any = getattr(batches, "total_dataset_length", None)
    sharded: Any = getattr(batches, "batch_sampler", None)
    if total is not None and hasattr(sharded, "num_processes"):
        share = -(-int(total) // int(batches.total_batch_size)) * int(batches.total_batch_size) // sharded.num_processes
        return min(int(total), share)
    sampler = getattr(batches, "sampler", None)
    return len(sampler) if hasattr(sampler, "__len__") else -1  # type: ignore[arg-type]


def _countable(batches: Any, num_samples: int | None) -> int:
    """How many samples there are to draw from; -1 where they have to be taken in order."""
    if num_samples is not None and num_samples <= 0:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}")
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"expected an iterable of batches (a DataLoader, a list of dicts), got {type(batches).__name__}"
        )
    if _can_draw(batches):
        return len(cast(Any, batches).dataset)
    if not isinstance(batches, list | tuple):
        return -1
    for batch in batches:
        _check_batch(batch)
    return sum(map(batch_size, batches))


def collect(samples: Samples, processes: Processes) -> tuple[list[Batch], Samples]:
    """All batches, so that they can be gone through again, and what was seen of them.

    Of several processes, each one takes its part of the number wanted.

    Raises:
        ValueError: fewer samples than asked for over all processes, or none.
    """
    error: Exception | None = None
    batches: list[Batch] = []
    try:
        batches = list(samples)
    except Exception as caught:
        error = caught
    processes.raise_on_every_rank(error)
    counts = processes.all_gather(samples.seen)
    samples.check_enough(sum(counts))
    if samples.limit is None or sum(counts) <= samples.limit:
        return batches, samples
    mine = Samples(batches, limit=_quotas(counts, samples.limit)[processes.rank], exact=False, several=True)
    return list(mine), mine


def _quotas(counts: list[int], wanted: int) -> list[int]:
    """How many each process contributes: equally many, and those who have more fill up for those who have less."""
    quotas = [0] * len(counts)
    while sum(quotas) < wanted:
        for rank, count in enumerate(counts):
            if quotas[rank] < count and sum(quotas) < wanted:
                quotas[rank] += 1
    return quotas


def without_repeats(loader: Any) -> Iterable[Batch]:
    """A rank's batches without the samples that were appended to make all shares equally long.

    torch's DistributedSampler and accelerate's loaders (`even_batches`) both take some samples twice.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        real = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
        return Samples(loader, limit=real, exact=False, several=True) if real else []
    sharded = getattr(loader, "batch_sampler", None)
    if not hasattr(loader, "total_dataset_length") or not getattr(sharded, "even_batches", False):
        return loader
    return _real_rows(loader, sharded)


def _real_rows(loader: Any, sharded: Any) -> Iterator[Batch]:
    """accelerate's order: in every round, process after process takes a batch; the last round may wrap around."""
    size, count = loader.total_batch_size // sharded.num_processes, loader.total_dataset_length
    for round_, batch in enumerate(loader):
        start = round_ * loader.total_batch_size + sharded.process_index * size
        real = min(batch_size(batch), max(0, count - start))
        if real:
            yield take_rows(batch, torch.arange(real)) if real < batch_size(batch) else batch


def _can_draw(loader: Any) -> bool:
    """Whether a loader stands for its whole data set: another sampler chose a part of it, and that choice is kept."""
    dataset, plain = getattr(loader, "dataset", None), (SequentialSampler, RandomSampler)
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return (
        indexed and getattr(loader, "batch_size", None) is not None and type(getattr(loader, "sampler", None)) in plain
    )


def _drawn_from_dataset(loader: Any, chosen: list[int]) -> Iterator[Batch]:
    size = loader.batch_size
    return (
        loader.collate_fn([loader.dataset[i] for i in chosen[start : start + size]])
        for start in range(0, len(chosen), size)
    )


def _drawn_from_list(batches: list[Any] | tuple[Any, ...], chosen: list[int]) -> Iterator[Batch]:
    owner = [(b, row) for b, batch in enumerate(batches) for row in range(batch_size(batch))]
    rows: dict[int, list[int]] = {}
    for i in chosen:
        rows.setdefault(owner[i][0], []).append(owner[i][1])
    return (take_rows(batches[b], torch.tensor(sorted(rows[b]))) for b in sorted(rows))


def draw(available: int, num_samples: int | None, seed: int) -> list[int]:
    """Numbers of the samples drawn from `available` ones, the same in every process.

    Raises:
        ValueError: fewer than asked for, or none.
    """
    return _draw([available], num_samples, seed, 0)


def _draw(counts: list[int], num_samples: int | None, seed: int, rank: int) -> list[int]:
    """Numbers drawn from everybody's samples, as far as they are this process's own."""
    available = sum(counts)
    if available == 0:
        raise ValueError("expected at least one sample to initialize from, got none: the data set is empty")
    wanted = num_samples if num_samples is not None else _default_count(available)
    if wanted > available:
        raise ValueError(_too_few(wanted, available))
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    drawn = drawn - sum(counts[:rank])
    return drawn[(drawn >= 0) & (drawn < counts[rank])].tolist()


def _default_count(available: int) -> int:
    return min(available, max(LEAST, math.ceil(available / SHARE)))


def _too_few(wanted: int, available: int) -> str:
    return (
        f"num_samples={wanted}, but the batches hold {available} samples: pass more data, a smaller num_samples, "
        "or leave num_samples out to take what there is"
    )


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected batches as dicts of tensors, got {type(batch).__name__}: give a collate_fn or loss_fn"
        )


def batch_size(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the first dimension that its tensors share.

    Raises:
        ValueError: no tensor, or tensors of different lengths.
    """
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0}
    if len(sizes) != 1:
        raise ValueError(f"expected the tensors of a batch to share their first dimension, got {sorted(sizes)}")
    return int(sizes.pop())


def take_rows(batch: Mapping[str, Any], rows: Tensor) -> Batch:
    """Some samples of a batch."""
    return {
        name: value.index_select(0, rows.to(value.device)) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in batch.items()
    }
