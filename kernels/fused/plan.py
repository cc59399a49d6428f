"""The choice of path and blocks, by rules from JSON tables: a user's first, then the shipped ones.

A rule holds if all its conditions do: `op`, `dtype`, `card` and `driver` by name, `dropout` by truth, `M`, `n`, `m`,
`r`, `sms` and `triton` by range [low, high]. `triton` is 100 times its major version plus the minor. Up to 3.7, Triton
does not prefetch operands from shared memory, and main loops on sm_80 to sm_89 can use at most 0.64 to 0.99 of the
tensor cores instead of 0.80 to 1.00 (`python -m benchmarks.kernels.main_loops`): cuBLAS multiplies there.

Each of path, prep, gemm, weights and overlaps comes from the first rule that holds and has it: one rule may give the
blocks, another the path. Nothing is timed here: first calls (lorasb/backends/autotune.py) and `lorasb bench tune` write
a user's table. A shipped table states in `measured` and `basis` what its rules are based on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..compat.triton import installed, warn_once
from .block_sizes import DECODE_ROWS, GemmConfig, PrepConfig, is_executed, quantized_config

TABLES = Path(__file__).parent / "tables"
CHOICES = {"path": ("fused", "addmm", "tma"), "weights": ("inline", "scratch"), "overlaps": (True, False)}
CHOSEN = ("path", "prep", "gemm", "weights", "overlaps")  # by rules, each separately
OVERLAPPING = ("sm_90", "sm_100", "sm_120")  # have griddepcontrol
LEAST_DRIVER = 545  # of CUDA 12.3: graphs have programmatic edges
INTERPRETER = "interpreter"  # the architecture of CPU tensors under TRITON_INTERPRET=1
BROKEN = (ValueError, TypeError, KeyError, AttributeError)  # raised when reading a file that is not a table
_user_tables: Callable[[], Path | None] | None = None  # returns their folder, if they are read
_machine: Callable[[], dict[str, object]] = dict  # returns the card and its driver
generation = 0  # how often the tables were forgotten; a plan is valid until this changes
# the dtypes that the kernels support, and their names in tables
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shape:
    """One product: M tokens, n in, m out (of a group: the sum over its members), rank r; weights dense or in 4 bits."""

    op: str
    dtype: str
    M: int
    n: int
    m: int
    r: int
    members: int = 1
    quant: str = "none"
    dropout: bool = False


# values that conditions name: a shape's fields, and the machine's
VALUES = asdict(Shape("", "", 0, 0, 0, 0)) | {"sms": 0, "triton": 0, "card": "", "driver": ""}


@dataclass(frozen=True)
class LaunchPlan:
    """Path `fused` is prep and the extended GEMM, `addmm` prep and two calls of cuBLAS, `tma` prep and `tma_gemm`.

    `weights` in 4 bits are dequantized `inline` by a separate GEMM, or into a `scratch` by prep. With `overlaps`, a
    fused or inline GEMM without a mask multiplies by the base while prep runs, as `tma` does.
    """

    path: str
    prep: PrepConfig
    gemm: GemmConfig
    weights: str = "scratch"
    overlaps: bool = False


@dataclass(frozen=True)
class Rule:
    """Choices to use if all conditions hold: each gives a value of a field, or a range [low, high] (null: no end)."""

    conditions: dict[str, object]
    path: str | None = None
    prep: PrepConfig | None = None
    gemm: GemmConfig | None = None
    weights: str | None = None
    overlaps: bool | None = None

    def holds(self, shape: Shape, sms: int) -> bool:
        """True if every condition holds."""
        major, minor = installed()
        values = {**asdict(shape), "sms": sms, "triton": 100 * major + minor, **_machine()}
        return all(name in values and _inside(values[name], wanted) for name, wanted in self.conditions.items())

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Rule:
        """Return a rule of a table; raise a ValueError or TypeError that says what is wrong with it."""
        prep, gemm, conditions = entry.get("prep"), entry.get("gemm"), entry.get("if", {})
        for name, known in CHOICES.items():
            if entry.get(name) not in (None, *known):
                raise ValueError(f"expected {name} {' or '.join(map(str, known))}, got {entry[name]!r}")
        if unknown := set(conditions) - set(VALUES):
            raise ValueError(f"unknown conditions {sorted(unknown)}")
        for name, wanted in conditions.items():
            _inside(VALUES[name], wanted)  # raises for an invalid range
        for blocks in (prep or {}, gemm or {}):
            for name, size in blocks.items():
                _check_size(name, size)
        return cls(
            conditions,
            entry.get("path"),
            None if prep is None else PrepConfig(**prep),
            None if gemm is None else GemmConfig(**gemm),
            entry.get("weights"),
            entry.get("overlaps"),
        )


def _check_size(name: str, size: Any) -> None:
    """Raise a ValueError for a block size that no kernel can have."""
    if name == "registers" and size is None:
        return
    least, is_power = (16 if name.startswith("block_") else 1), name == "warps" or name.startswith("block_")
    if type(size) is not int or size < least or (is_power and size & (size - 1)):
        wanted = "a power of two" if is_power else "a whole number"
        raise ValueError(f"expected {name} to be {wanted}, {least} or more, got {size!r}")


def _inside(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        low, high = wanted
        return all((value >= low, high is None or value <= high))
    return bool(value == wanted)


def choose(shape: Shape, arch: str, sms: int) -> LaunchPlan:
    """The plan for a shape on an architecture ("sm_86") with so many multiprocessors; "interpreter" on the CPU."""
    shipped = shipped_rules(arch)
    if arch == INTERPRETER:
        weights = "inline" if shape.M <= DECODE_ROWS else "scratch"
        return replace(_by_rules(shipped, shape, sms), path="fused", weights=weights)
    if not is_known(arch):
        warn_once(f"lorasb's kernels were not tested for {arch}: cuBLAS computes all products but the thin ones")
        return replace(_by_rules(shipped, shape, sms), path="addmm", weights="scratch", overlaps=False)
    chosen = _by_rules((*user_rules(arch), *shipped), shape, sms)
    chosen = chosen if has_executed_code(chosen, shape, arch) else _by_rules(shipped, shape, sms)
    return chosen if launches_overlap(arch) else replace(chosen, overlaps=False)


def _by_rules(rules: tuple[Rule, ...], shape: Shape, sms: int) -> LaunchPlan:
    holding = [rule for rule in rules if rule.holds(shape, sms)]
    found = {name: next((v for rule in holding if (v := getattr(rule, name)) is not None), None) for name in CHOSEN}
    return LaunchPlan(**{name: value for name, value in found.items() if value is not None})


def has_executed_code(chosen: LaunchPlan, shape: Shape, arch: str) -> bool:
    """True if tests execute the code of a plan's kernels: TMA only on sm_90 and over dense weights, tcgen05 nowhere."""
    code, blocks = family(arch), [chosen.prep.block_m, chosen.gemm.block_m]
    if shape.quant != "none" and chosen.weights == "inline":
        blocks.append(quantized_config(shape.M, 4 if shape.dtype == "fp32" else 2).block_m)
    by_tma = code == "sm_90" and shape.quant == "none" and launches_overlap(arch)
    return (chosen.path != "tma" or by_tma) and all(is_executed(rows, code) for rows in blocks)


def launches_overlap(arch: str) -> bool:
    """True if a launch can begin before the previous one has ended, also while a graph is captured."""
    driver = re.match(r"\d+", str(_machine().get("driver", "")))
    return family(arch) in OVERLAPPING and (driver is None or int(driver[0]) >= LEAST_DRIVER)


@lru_cache(maxsize=4096)
def choice(shape: Shape, arch: str, sms: int) -> LaunchPlan:
    """`choose`, cached: a call of a layer looks up its plan."""
    return choose(shape, arch, sms)


def bucket(tokens: int) -> int:
    """Return the M that represents `tokens`: the next power of two. Plans are looked up and measured by it."""
    return 1 << max(0, tokens - 1).bit_length()


@lru_cache
def family(arch: str) -> str:
    """Return the architecture whose table and code this one shares: "sm_100" for "sm_103", "sm_86" when interpreted.

    Also "sm_100" for an unknown one: its blocks compile to mma.sync, which all have.
    """
    if arch == INTERPRETER:
        return "sm_86"
    return re.sub(r"(?<=sm_1[02])\d$", "0", arch) if is_known(arch) else "sm_100"


def is_known(arch: str) -> bool:
    """True if kernels were executed as compiled for this architecture, or for one with the same instructions."""
    return arch == INTERPRETER or bool(re.fullmatch(r"sm_(8[069]|90|1[02]\d)", arch))


@lru_cache
def shipped_rules(arch: str) -> tuple[Rule, ...]:
    return read_rules(TABLES / f"{family(arch)}.json")


@lru_cache
def user_rules(arch: str) -> tuple[Rule, ...]:
    """Read the table that was measured for this architecture; warn about and ignore one that cannot be read."""
    folder = None if _user_tables is None else _user_tables()
    if folder is None:
        return ()
    path = folder / f"{arch}.json"
    try:
        return read_rules(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, *BROKEN) as error:
        why = getattr(error, "strerror", None) or error
        warn_once(
            f"{path} cannot be read as a table of kernels ({why}): taking the shipped one. Delete it, or let `lorasb "
            "bench tune` write a new one"
        )
        return ()


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Return a table's rules; raise a ValueError if it is not a table, or names an unknown path or condition."""
    return tuple(Rule.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rules"])


def read_user_tables_from(folder: Callable[[], Path | None], machine: Callable[[], dict[str, object]]) -> None:
    """Set the functions that return the folder of a user's own tables, and the card and driver that these are for."""
    global _user_tables, _machine
    _user_tables, _machine = folder, machine
    forget()


def forget() -> None:
    """Read the tables again at the next choice."""
    global generation
    generation += 1
    for cached in (choice, shipped_rules, user_rules):
        cached.cache_clear()
