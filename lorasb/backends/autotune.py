"""Autotuning of the Triton kernels: candidates are timed in turns, and the choice is saved in the user's table.

The first call of each kind on a GPU compares one tile of each result with torch's; with `LEAST_TOKENS` tokens or more
it also times paths and tiles: about 10 ms, or five rounds, plus compilation. LORASB_TUNE=cached uses the measurements
of earlier runs and times nothing, as do CUDA graph capture and `torch.use_deterministic_algorithms`; LORASB_TUNE=off
uses the shipped tables.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.triton import has_tma, installed, warn_once
from ..kernels import plan
from ..kernels.block_sizes import DECODE_ROWS, GemmConfig, PrepConfig
from ..kernels.operands import Mask, Members
from ..kernels.plan import LaunchPlan, Shape
from ..ops.registry import WORD, unpack_words
from ..utils.atomic_files import cache_dir, write_text
from ..utils.reading import Json
from .eager import philox_mask

MODE = "LORASB_TUNE"  # environment variable
# Errors that the driver reports at some later call, not their cause; nothing runs on the device afterwards.
FAULTS = re.compile(
    r"illegal (memory access|address|instruction)|misaligned address|device-side assert|hardware error|"
    r"launch (failure|timed out)|uncorrectable|invalid program counter|invalid address space"
)
MODES = ("on", "cached", "off")
DRIVER = Path("/proc/driver/nvidia/version")  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  ..."
LEAST_TOKENS = 256  # with fewer, reading W is the bottleneck for any tiles
BUDGET = 10.0  # ms of timing per kind; LEAST_ROUNDS run in any case
LEAST_ROUNDS, MOST_ROUNDS = 5, 10
MAX_SPREAD = 0.2  # of the median: if the times, without a quarter at either end, differ by more, they are not used
WORTH = 0.97  # another plan is chosen if it takes less than this share of the table's time
FLUSHED = 1 << 26  # bytes written before every call; twice L2 where that is more
AHEAD = 400_000  # cycles of delay before every call, for the host to launch all of it: only GPU time is compared
# Paths and tiles in addition to the table's choice. Those that need more registers or shared memory than the GPU has
# do not compile, and are skipped.
PREPS = (PrepConfig(32, 64, 4, 3), PrepConfig(64, 64, 4, 3), PrepConfig(64, 32, 4, 4), PrepConfig(128, 32, 8, 3))
GEMMS = (
    GemmConfig(128, 128, 32, 8, 4, 4),
    GemmConfig(64, 128, 64, 8, 4, 2),
    GemmConfig(128, 256, 64, 8, 8, 3),
    GemmConfig(128, 256, 32, 8, 8, 3),
    GemmConfig(128, 128, 64, 8, 8, 3),
    GemmConfig(128, 128, 64, 8, 4, 2),
    GemmConfig(128, 64, 64, 8, 4, 3),
    GemmConfig(64, 64, 32, 8, 4, 4),
)
# Tiles tried at a first call, each compiled while the user waits: for mma.sync, and for wgmma.
FIRST_GEMMS, FIRST_WIDE_GEMMS = GEMMS[:2], GEMMS[2:3]
# TMA tiles, on sm_90; a first call tries only the first one.
TMA_GEMMS = (GemmConfig(128, 256, 64, 8, 8, 3), GemmConfig(128, 128, 64, 8, 8, 4))
# For up to DECODE_ROWS tokens: the smallest block of rows that a tensor-core product has.
DECODE_GEMMS = (GemmConfig(16, 64, 64, 1, 4, 3), GemmConfig(16, 32, 128, 1, 4, 4), GemmConfig(16, 128, 64, 1, 4, 4))
# Largest accepted difference from torch's result, over its magnitude: many times the error of TF32 and rounding.
TOLERANCES = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 0.01}
TILE_ROWS, TILE_COLUMNS = 16, 64
OVERFLOWING = 64.0  # v and w are larger than y and dx by sqrt(m / r), as B's columns have unit norm

Gradients = tuple[Tensor | None, Sequence[Tensor]]  # dx, dR_j
Call = Callable[[], object]
Run = Callable[[LaunchPlan], Any]  # computes a call by a plan
Check = Callable[[Any], None]  # raises a `WrongResultError` for a wrong result
Clock = Callable[[Sequence[Call]], "list[float]"]  # runs each call once, and returns their times in ms
_first: dict[Hashable, LaunchPlan] = {}  # plans of kinds that have had their first call
_checked: set[Hashable] = set()  # kinds that have passed `first_check`


class WrongResultError(RuntimeError):
    """Error of a kernel whose result differs from torch's."""


class Tuned(NamedTuple):
    """The fastest plan of a shape, and the times in ms of the table's previous choice and of this plan."""

    shape: Shape
    best: LaunchPlan
    before: float
    after: float


def mode() -> str:
    """Return LORASB_TUNE: "on", "cached" or "off"; warn about other values and return "on"."""
    value = os.environ.get(MODE) or "on"
    if value not in MODES:
        warnings.warn(f"expected {MODE} to be one of {', '.join(MODES)}, got {value!r}: using 'on'", stacklevel=2)
    return value if value in MODES else "on"


def tables() -> Path | None:
    """The folder of the user's tables; None with LORASB_TUNE=off."""
    return None if mode() == "off" else cache_dir() / "kernels"


@cache
def machine() -> dict[str, object]:
    """Return the GPU and its driver, which measured rules depend on; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    found = re.search(r"\d+\.[\d.]+", DRIVER.read_text(encoding="utf-8")) if DRIVER.is_file() else None
    return {"card": torch.cuda.get_device_name(), "driver": found[0] if found else "unknown"}


def first_plan(
    shape: Shape, arch: str, sms: int, run: Run, check: Check, clock: Callable[[], Clock], variant: Hashable = None
) -> LaunchPlan:
    """Return the plan of a kind of call, checked and timed on its first call; `clock` creates the timer.

    A `variant` of the shape, such as one with a bias, is a separate compiled kernel and is checked as well.
    """
    kind = shape, arch, sms, variant, plan.generation
    chosen = plan.choice(shape, arch, sms)
    if kind in _first or is_capturing():
        return _first.get(kind, chosen)
    try:
        check(run(chosen))
        if _is_timed(shape, arch, sms):
            plans = candidates(shape, chosen, arch, FIRST_WIDE_GEMMS if arch == "sm_90" else FIRST_GEMMS)
            tuned = fastest(shape, plans, run, check, clock())
            if tuned is not None:
                chosen = tuned.best
                _remember(tuned, arch, sms)
    except torch.OutOfMemoryError:  # raised again by the call itself, if that does not fit either
        warn_once("the GPU has too little free memory to time the kernels: calls use the shipped tables' plans")
    _first[kind] = chosen
    return chosen


def first_check(kind: Hashable, rows: Tensor, check: Callable[[], None]) -> None:
    """Check a kind of call whose plans are not timed, on its first call on a GPU."""
    if rows.is_cuda and rows.numel() and kind not in _checked and not is_capturing():
        with suppress(torch.OutOfMemoryError):  # the next call is checked instead
            check()
            _checked.add(kind)


def is_capturing() -> bool:
    """True while a CUDA graph is captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_timed(shape: Shape, arch: str, sms: int) -> bool:
    if mode() != "on" or shape.M < LEAST_TOKENS or not plan.is_known(arch):
        return False
    is_measured = any(rule.path and rule.holds(shape, sms) for rule in plan.user_rules(arch))
    return not is_measured and not torch.are_deterministic_algorithms_enabled()


def candidates(
    shape: Shape, chosen: LaunchPlan, arch: str, gemms: Sequence[GemmConfig] | None = None
) -> Iterator[LaunchPlan]:
    """Yield the table's choice, then plans with another path and `gemms`, or all tiles and thin products if None."""
    yield chosen
    for one in dict.fromkeys(_others(shape, chosen, gemms)):
        if one != chosen and plan.has_executed_code(one, shape, arch):
            yield one


def _others(shape: Shape, chosen: LaunchPlan, gemms: Sequence[GemmConfig] | None) -> Iterator[LaunchPlan]:
    if shape.quant != "none":  # inline weights have one path, which needs full bytes per row and has no mask
        if not shape.dropout and shape.n % 2 == 0:
            yield replace(chosen, weights="inline")
        yield (chosen := replace(chosen, weights="scratch"))
    yield replace(chosen, path="addmm" if chosen.path == "fused" else "fused")
    all_tiles = DECODE_GEMMS if shape.M <= DECODE_ROWS else GEMMS
    yield from (replace(chosen, path="fused", gemm=gemm) for gemm in (all_tiles if gemms is None else gemms))
    if has_tma() and shape.M > DECODE_ROWS and shape.dtype != "fp32" and shape.quant == "none":
        by_tma = TMA_GEMMS if gemms is None else TMA_GEMMS[:1]
        yield from (replace(chosen, path="tma", gemm=gemm) for gemm in by_tma)
    if gemms is None and shape.M > DECODE_ROWS:
        yield from (replace(chosen, prep=prep) for prep in PREPS)


def fastest(shape: Shape, plans: Iterable[LaunchPlan], run: Run, check: Check, clock: Clock) -> Tuned | None:
    """Time the plans that run, in turns, the table's choice first; return None if the times are inconclusive."""
    plans = list(plans)
    running: dict[LaunchPlan, Call] = {}
    for one in plans:
        try:
            check(run(one))
        except Exception as error:  # Triton's OutOfResources, or memory
            if FAULTS.search(str(error)):  # nothing runs on the device afterwards
                raise
            continue
        running[one] = partial(run, one)
    if not running:
        return None
    rounds = [clock(list(running.values()))]
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and (len(rounds) + 1) * sum(rounds[0]) <= BUDGET):
        rounds.append(clock(list(running.values())))
    by_plan = dict(zip(running, zip(*rounds, strict=True), strict=True))
    times = {one: statistics.median(taken) for one, taken in by_plan.items()}
    best, before = min(times, key=times.__getitem__), times.get(plans[0], float("inf"))
    if any(_is_noisy(by_plan[one]) for one in (best, plans[0]) if one in by_plan):
        warn_once(
            f"another program seems to use the GPU: times of one kernel differ by more than {MAX_SPREAD:.0%}, so the "
            "built-in choice of kernels stays. To time them, run `lorasb bench tune MODEL` when nothing else runs"
        )
        return None
    if times[best] > WORTH * before:
        best = plans[0]
    return Tuned(shape, best, before, times[best])


def _is_noisy(times: Sequence[float]) -> bool:
    ordered, cut = sorted(times), len(times) // 4
    return ordered[-1 - cut] - ordered[cut] > MAX_SPREAD * statistics.median(times)


class CudaClock:
    """Time calls by CUDA events, each with a cold L2; writing the L2 takes long enough to hide the host's launches."""

    def __init__(self, device: torch.device) -> None:
        size = max(FLUSHED, 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", FLUSHED))
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        marks = []
        with torch.cuda.device(self.flushed.device):  # events belong to the current device
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flushed.zero_()
                torch.cuda._sleep(AHEAD)
                start.record()
                call()
                end.record()
                marks.append((start, end))
            torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


def write(tuned: Sequence[Tuned], arch: str, sms: int) -> Path:
    """Write the user's table: new rules, then its old ones for other shapes; raise an OSError if that fails."""
    path = cache_dir() / "kernels" / f"{arch}.json"
    rules = [_rule(result, sms) for result in tuned]
    new_conditions = [rule["if"] for rule in rules]
    rules += [rule for rule in _rules_of(path) if rule.get("if") not in new_conditions]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"arch": arch, "measured": True, "torch": torch.__version__, "rules": rules}
    write_text(path, json.dumps(table, indent=1) + "\n")
    return path


def _rules_of(path: Path) -> list[Json]:
    """Return a table's rules as stored on disk; none if it is broken, so that it is overwritten."""
    try:
        plan.read_rules(path)
        rules: list[Json] = json.loads(path.read_text(encoding="utf-8"))["rules"]
    except (OSError, *plan.BROKEN):
        return []
    return rules


def _remember(tuned: Tuned, arch: str, sms: int) -> None:
    """Write the table, or warn: this process uses its choice anyway."""
    try:
        write([tuned], arch, sms)
    except OSError as error:
        warn_once(  # without the temporary file's name, which differs every time
            f"the kernels' timings cannot be saved in {cache_dir() / 'kernels'} ({error.strerror or error}). "
            f"Set LORASB_CACHE to a writable folder, or {MODE}=cached"
        )


def _rule(tuned: Tuned, sms: int) -> dict[str, object]:
    # M is a power of two (`plan.bucket`); the rule covers the bucket (M / 2, M].
    s, best, (major, minor) = tuned.shape, tuned.best, installed()
    conditions = asdict(s) | {"M": [s.M // 2 + 1, s.M], "sms": sms, "triton": [100 * major + minor] * 2} | machine()
    gemm = {k: v for k, v in asdict(best.gemm).items() if v is not None}
    rule: dict[str, object] = {"if": conditions, "path": best.path, "prep": asdict(best.prep), "gemm": gemm}
    return rule | ({} if s.quant == "none" else {"weights": best.weights})


def check_forward(x: Tensor, members: Members, mask: Mask, found: tuple[Sequence[Tensor], object]) -> None:
    """Raise where the first rows and columns of a y_j [M, m_j] differ from torch's, in fp32, by more than rounding.

    A core is R [r, r], or [T, r, r] with an R for each of the first T = `TILE_ROWS` rows.
    """
    ys, _ = found
    rows = x[:TILE_ROWS].float()
    for y, keep, weight, a, core, b, bias, scale in zip(ys, _keep_masks(mask, x, members), *members, strict=True):
        v, b = scale * _times((rows * keep) @ a.float().mT, core.float().mT), b[:TILE_COLUMNS].float()
        want, size = v @ b.mT, (v.square() @ b.mT.square()).sqrt()
        if weight is not None:
            w = weight[:TILE_COLUMNS].float()
            want, size = want + rows @ w.mT, size + (rows.square() @ w.mT.square()).sqrt()
        if bias is not None:
            want = want + bias[:TILE_COLUMNS].float()
        _check("y", y[:TILE_ROWS, :TILE_COLUMNS], want, size)


def _times(rows: Tensor, core: Tensor) -> Tensor:
    return rows @ core if core.dim() == 2 else (rows.unsqueeze(1) @ core).squeeze(1)


def _keep_masks(mask: Mask, rows: Tensor, members: Members) -> list[Tensor]:
    """Return 1 per member where dropout keeps an element of x's first rows, and 0 elsewhere."""
    if mask.dropout == 0.0:
        return [torch.ones((1, 1), device=rows.device)] * len(members.a)
    shape = torch.Size((min(TILE_ROWS, len(rows)), members.a[0].shape[1]))
    return [philox_mask(shape, mask.dropout, seed, rows.device).float() for seed in mask.seeds]


def check_backward(dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], mask: Mask, found: Gradients) -> None:
    """Raise where the first entries of dx [M, n] or of a dR_j differ from torch's."""
    dx, dcores = found
    if dx is not None:
        want = size = torch.zeros((), device=dx.device)
        for dy, keep, weight, a, core, b, _, scale in zip(
            dys, _keep_masks(mask, dys[0], members), *members, strict=True
        ):
            rows, a = dy[:TILE_ROWS].float(), a[:, :TILE_COLUMNS].float()
            w = scale * _times(rows @ b.float(), core.float())
            want, size = want + keep[:, :TILE_COLUMNS] * (w @ a), size + (w.square() @ a.square()).sqrt()
            if weight is not None:
                part = weight[:, :TILE_COLUMNS].float()
                want, size = want + rows @ part, size + (rows.square() @ part.square()).sqrt()
        _check("dx", dx[:TILE_ROWS, :TILE_COLUMNS], want, size)
    for dy, u, dcore, b, scale in zip(dys, us, dcores, members.b, members.scales, strict=False):
        t, u = (dy @ b[:, :TILE_ROWS]).float(), u[:, :TILE_ROWS].float()
        size = (t.square().mT @ u.square()).sqrt() * abs(scale)
        _check("dR", dcore[:TILE_ROWS, :TILE_ROWS], scale * t.mT @ u, size, dy.dtype)


def check_gradient(dy: Tensor, x: Tensor, found: Tensor) -> None:
    """Raise where the first entries of G = dyᵀ x [m, n] differ."""
    _check("the gradient", found[:TILE_ROWS, :TILE_COLUMNS], *_gradient_tile(dy, x), x.dtype)


def check_signs(dy: Tensor, x: Tensor, words: Tensor, nonzero: Tensor) -> None:
    """Raise where the packed signs of the first entries of G differ, except for entries near zero."""
    (want, size), count = _gradient_tile(dy, x), TILE_COLUMNS // WORD
    signs = unpack_words(words[:TILE_ROWS, :count], want.shape[1], -1.0, 1.0, want.dtype)
    kept = unpack_words(nonzero[:TILE_ROWS, :count], want.shape[1], 0.0, 1.0, want.dtype)
    _check("the gradient by its signs", signs * kept * want.abs(), want, size, x.dtype)


def _gradient_tile(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first entries of G, and the magnitude of their sums."""
    left, right = dy[:, :TILE_ROWS].float().mT, x[:, :TILE_COLUMNS].float()
    return left @ right, (left.square() @ right.square()).sqrt()


def check_weight(found: Tensor, want: Tensor) -> None:
    """Raise where the first entries of a dequantized W differ."""
    tile = want[:TILE_ROWS, :TILE_COLUMNS].float()
    wide = torch.float32 if found.dtype == torch.float64 else None  # W has no more digits than that
    _check("W", found[:TILE_ROWS, :TILE_COLUMNS], tile, tile.abs(), wide)


def _check(name: str, got: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare two tiles, except where torch's values are not finite; `size`: the magnitude of their sums."""
    error, magnitude = (got.float() - want).abs(), size + want.abs()
    # Larger values overflow in fp16 (by design in GradScaler's first step), and v and w overflow earlier.
    is_compared = magnitude < torch.finfo(got.dtype).max / OVERFLOWING
    is_wrong = ~(error <= TOLERANCES[dtype or got.dtype] * magnitude) & is_compared
    if bool(is_wrong.any()):
        worst = error[is_wrong].nan_to_num(torch.inf).max().item()
        raise WrongResultError(f"{name} differs from torch's by up to {worst:.3g} in the tile that was compared")
