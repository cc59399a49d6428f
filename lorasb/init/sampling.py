"""Select samples for initialization: a seeded draw if the data can be indexed, else iteration order.

Under torch.distributed each rank selects from its own share, and counts are totals over all ranks.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from ..distributed.process_group import Processes

Batch = dict[str, Any]
Loader = Any  # a DataLoader of torch or accelerate, a list of batches or another iterable of them
DATA_SET_DIVISOR = 1000  # the paper takes 1/1000 of the data set (appendix I)
MIN_SAMPLES = 32  # the default never takes fewer, unless the data set has fewer
BOUNDARIES = "cu_seq_lens"  # prefix of entries that mark where a packed batch's examples begin; not one per row


def select(batches: Loader, num_samples: int | None, seed: int, whole: bool = False) -> list[Batch]:
    """Return this rank's samples: drawn from a DataLoader's data set or a list's rows, else an iterable's first ones.

    A DataLoader with a custom sampler (a subset, a rank's share) is read in its order, like an iterable. With `whole`,
    batches (of pairs) are not cut: lists too are read in order, and the last batch may exceed `num_samples`.
    """
    processes = Processes()
    with processes.together():
        _check_samples(batches, num_samples)
        drawn = _can_draw(batches) or (isinstance(batches, list | tuple) and not whole)
        own = len(batches.dataset) if _can_draw(batches) else _own_rows(batches)
    # Either all ranks draw or all read in order: what every rank knows chooses the branch.
    every = processes.gather_json([drawn, own])
    lengths: list[int | None] = [length for _, length in every]
    limit: int | None = None  # of samples in iteration order
    if all(is_drawn for is_drawn, _ in every):
        chosen = draw(cast("list[int]", lengths), num_samples, seed, processes.rank)
        source = _drawn_from_dataset(batches, chosen) if _can_draw(batches) else _drawn_from_list(batches, chosen)
    else:
        source, limit = without_repeats(batches), num_samples
        if num_samples is None and None not in lengths:  # the default depends on the length of every rank's share
            limit = _default_count(sum(cast("list[int]", lengths)))
    with processes.together():
        found = list(_first(source, limit, whole))
    counts = processes.all_gather(sum(map(batch_size, found)))
    if sum(counts) == 0:  # the same sum, and so the same error, on every rank
        raise ValueError("expected at least one sample to initialize from, got none: the batches are empty")
    if limit is not None and num_samples is not None and sum(counts) < num_samples:
        raise ValueError(too_few(num_samples, sum(counts)))
    if limit is None or sum(counts) <= limit:
        return found
    return list(_first(found, _quotas(counts, limit)[processes.rank], whole))


def _first(batches: Iterable[Batch], limit: int | None, whole: bool = False) -> Iterator[Batch]:
    """Yield batches up to `limit` samples, or all for None; empty ones are skipped."""
    left = math.inf if limit is None else limit
    for batch in batches if left else ():
        rows = int(min(batch_size(batch), left))
        if rows:
            cut = rows < batch_size(batch) and not whole
            yield dict(take_rows(batch, torch.arange(rows)) if cut else batch)
        left -= rows
        if not left:  # before the next batch is fetched: a stream may be endless, or costly
            break


def samples_hash(batches: list[Batch], processes: Processes) -> str:
    """Return the SHA-256 of the samples' values, in order; with several ranks, of the ranks' digests."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):  # a collator may order its keys differently from run to run
            for content in _contents(batch[name]):
                digest.update(name.encode())
                digest.update(content)
    every = processes.gather_json(digest.hexdigest())
    return every[0] if len(every) == 1 else hashlib.sha256(b"".join(map(bytes.fromhex, every))).hexdigest()


def _contents(value: object) -> Iterator[bytes]:
    """Yield the bytes of a tensor, array, string or number, or of a list or dict of these; nothing for other types."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1)
        yield content.view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, str | int | float):
        yield repr(value).encode()
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _contents(one)
    elif isinstance(value, Mapping):  # boxes and classes of an image
        for name in sorted(value, key=str):
            yield repr(name).encode()
            yield from _contents(value[name])


def _check_samples(batches: Loader, num_samples: int | None) -> None:
    """Raise for a count below 1, and for what is no iterable of batches."""
    if num_samples is not None and num_samples <= 0:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}")
    # Dicts and strings are iterable, but are mistakes here: a single batch, or a path.
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"expected an iterable of batches (DataLoader, list of dicts), got {type(batches).__name__}")


def _quotas(counts: list[int], total: int) -> list[int]:
    """Samples that each rank contributes to `total`: equal shares; ranks with more make up for those with less."""
    in_turns = sorted((i, rank) for rank, count in enumerate(counts) for i in range(count))[:total]
    return [sum(taken == rank for _, taken in in_turns) for rank in range(len(counts))]


def without_repeats(loader: Loader) -> Iterable[Batch]:
    """Return a rank's batches without the duplicates appended to make all shares equally long."""
    # torch's DistributedSampler and accelerate's loaders (`even_batches`) both append repeated samples to a rank's own;
    # these would count twice in ΣG.
    evened = getattr(getattr(loader, "batch_sampler", None), "even_batches", False)
    padded = isinstance(_sampler(loader), DistributedSampler)
    return _first(loader, _own_rows(loader)) if padded or evened else loader


def _sampler(loader: Loader) -> object:
    """Return the sampler of a loader's rows, from inside the batch sampler if the caller gave one."""
    batched, own = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    return getattr(batched, "sampler", own) if getattr(loader, "batch_size", None) is None else own


def _own_rows(loader: Loader) -> int | None:
    """Number of samples that this rank iterates over, without repeated ones; None if unknown."""
    if isinstance(loader, list | tuple):
        return sum(map(batch_size, loader))
    if not hasattr(getattr(loader, "dataset", loader), "__len__"):
        return None
    sampler, sharded = _sampler(loader), getattr(loader, "batch_sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        # rank, rank + num_replicas, ...
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    total, ranks = getattr(loader, "total_dataset_length", None), getattr(sharded, "num_processes", None)
    if total is None or sharded is None or ranks is None:
        return len(sampler) if isinstance(sampler, Sized) else None
    # accelerate's loaders: in each round, rank p has the rows from p·size on
    size, (rounds, rest) = loader.total_batch_size // ranks, divmod(total, loader.total_batch_size)
    return rounds * size + min(size, max(0, rest - sharded.process_index * size))


def _can_draw(loader: Loader) -> bool:
    """True if samples may be drawn from a loader's whole data set."""
    # A sampler other than torch's sequential and random ones is a selection by the caller (a subset, weights, a rank's
    # share), which a draw from the data set would undo.
    dataset, batched = getattr(loader, "dataset", None), getattr(loader, "batch_size", None) is not None
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return batched and indexed and type(getattr(loader, "sampler", None)) in (SequentialSampler, RandomSampler)


def _drawn_from_dataset(loader: Loader, chosen: list[int]) -> Iterable[Batch]:
    # Not through the loader: its workers and its random sampler would advance the global random state.
    for start in range(0, len(chosen), loader.batch_size):
        yield loader.collate_fn([loader.dataset[i] for i in chosen[start : start + loader.batch_size]])


def _drawn_from_list(batches: Sequence[Batch], chosen: list[int]) -> Iterable[Batch]:
    # Rows of one batch stay together, in order: padded to one length, they may not fit into a batch with others.
    positions = [(b, row) for b, batch in enumerate(batches) for row in range(batch_size(batch))]
    rows: dict[int, list[int]] = {}
    for i in chosen:
        b, row = positions[i]
        rows.setdefault(b, []).append(row)
    return (take_rows(batches[b], torch.tensor(sorted(rows[b]))) for b in sorted(rows))


def draw(counts: list[int], num_samples: int | None, seed: int, rank: int) -> list[int]:
    """Draw from all ranks' samples, numbered one rank after another; return the indices of this rank's."""
    available = sum(counts)
    count = num_samples if num_samples is not None else _default_count(available)
    if count > available:
        raise ValueError(too_few(count, available))
    # The same permutation on every rank, so no communication is needed to split it.
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
    drawn = drawn - sum(counts[:rank])
    return drawn[(drawn >= 0) & (drawn < counts[rank])].tolist()


def _default_count(available: int) -> int:
    return min(available, max(MIN_SAMPLES, math.ceil(available / DATA_SET_DIVISOR)))


def too_few(num_samples: int, available: int) -> str:
    """Return the warning if fewer samples than requested were found."""
    return (
        f"num_samples={num_samples}, but the batches hold {available} samples: pass more data, a smaller num_samples, "
        "or leave num_samples out to take what there is"
    )


def batch_size(batch: Mapping[str, object]) -> int:
    """Number of samples in a batch: the first dimension, which its tensors share. 0-D tensors do not count."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"expected batches as dicts of tensors, got {type(batch).__name__}: give a collate_fn")
    # A set, so that a mask or label of a different length is detected.
    of_rows = (value for name, value in batch.items() if not str(name).startswith(BOUNDARIES))
    sizes = {value.shape[0] for value in of_rows if isinstance(value, Tensor) and value.dim() > 0}
    row = [value for name in ("input_ids", "labels") if isinstance(value := batch.get(name), Tensor)]
    if len(sizes) > 1 and row and all(len(value) == 1 for value in row if value.dim()):
        return 1  # one row, with its patches or images
    if len(sizes) != 1:
        raise ValueError(
            f"expected the tensors of a batch to share their first dimension, got {sorted(sizes)}: give batches of one "
            "row, or give tensors of another length as a list with an entry per row, which loss_fn joins"
        )
    return int(sizes.pop())


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """Return a batch's samples at the indices `rows`, from tensors, and lists and arrays with a value per sample."""
    size = batch_size(batch)
    if size == 1 and len(rows):
        return dict(batch)

    def taken(value: Any) -> Any:
        """Return the part of an entry that belongs to `rows`."""
        if isinstance(value, Mapping):
            return {name: taken(one) for name, one in value.items()}
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.index_select(0, rows.to(value.device))
        if isinstance(value, np.ndarray) and value.ndim and len(value) == size:
            return value[rows.numpy()]
        # not a tuple, which is one value (an image's size)
        return [value[i] for i in rows.tolist()] if isinstance(value, list) and len(value) == size else value

    return {name: value if name.startswith(BOUNDARIES) else taken(value) for name, value in batch.items()}


def split_in_half(batch: Batch) -> list[Batch]:
    """Split a batch's rows into two batches, the second with the odd row; a batch of one row is not split."""
    rows = batch_size(batch)
    return [take_rows(batch, part) for part in torch.arange(rows).tensor_split([rows // 2]) if len(part)]


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch: of the CPU and, once CUDA is in use, of every GPU."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
