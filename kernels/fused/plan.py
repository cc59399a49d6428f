"""Which path and which blocks: rules from JSON tables, a user's first, then the shipped ones, then a safe default.

A rule holds where all its conditions do: `op`, `dtype`, `card` and `driver` by name, `dropout` by truth, `M`, `n`, `m`,
`r`, `sms` and `triton` by range [low, high]. `triton` is 100 times its major version plus the minor. Up to 3.7 Triton
does not prefetch operands from shared memory, and main loops on sm_80 to sm_89 are bound by 0.64 to 0.91 of the tensor
cores in place of 0.80 to 1.00 (`python -m benchmarks.kernels.main_loops`): there cuBLAS multiplies.

For each of path, prep, gemm and weights the first rule that holds and has it is taken: one rule may give the blocks,
another the path. Nothing is timed here: first calls (lorasb/backends/autotune.py) and `lorasb bench tune` write a
user's table. A shipped table states in `measured` and `basis` what its rules rest on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..compat.triton import installed
from .block_sizes import DECODE_ROWS, GemmConfig, PrepConfig

TABLES = Path(__file__).parent / "tables"
CHOICES = {"path": ("fused", "addmm", "tma"), "weights": ("inline", "scratch")}
INTERPRETER = "interpreter"  # the architecture of CPU tensors under TRITON_INTERPRET=1
OF_THE_MACHINE = ("sms", "triton", "card", "driver")  # conditions besides a shape's fields
BROKEN = (ValueError, TypeError, KeyError, AttributeError)  # what reading a table that is none raises
_user_tables: Callable[[], Path | None] | None = None
_machine: Callable[[], dict[str, object]] = dict  # the card and its driver
generation = 0  # how often the tables were forgotten; a plan holds as long as it has not changed
# the names of dtypes in tables, and the dtypes that the kernels have
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


@dataclass(frozen=True)
class LaunchPlan:
    """`fused`: prep and the extended GEMM; `addmm`: prep, then cuBLAS twice, the second onto the first; `tma`: prep and
    `tma_gemm`.

    `weights`, where they have 4 bits: dequantized `inline` by a separate GEMM, or into a `scratch` by prep.
    """

    path: str
    prep: PrepConfig
    gemm: GemmConfig
    weights: str = "scratch"


@dataclass(frozen=True)
class Rule:
    """Value to take where every condition holds: a value, or a range [low, high] (null: no end), by a Shape's field."""

    conditions: dict[str, object]
    path: str | None = None
    prep: PrepConfig | None = None
    gemm: GemmConfig | None = None
    weights: str | None = None

    def holds(self, shape: Shape, sms: int) -> bool:
        """True if every condition holds."""
        major, minor = installed()
        values = {**asdict(shape), "sms": sms, "triton": 100 * major + minor, **_machine()}
        return all(name in values and _inside(values[name], wanted) for name, wanted in self.conditions.items())

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Rule:
        """A rule of a table; a ValueError or TypeError says what is wrong with it."""
        prep, gemm, conditions = entry.get("prep"), entry.get("gemm"), entry.get("if", {})
        for name, known in CHOICES.items():
            if entry.get(name) not in (None, *known):
                raise ValueError(f"expected {name} {' or '.join(known)}, got {entry[name]!r}")
        unknown = set(conditions) - {*Shape.__dataclass_fields__, *OF_THE_MACHINE}
        if unknown:
            raise ValueError(f"unknown conditions {sorted(unknown)}")
        return cls(
            conditions,
            entry.get("path"),
            None if prep is None else PrepConfig(**prep),
            None if gemm is None else GemmConfig(**gemm),
            entry.get("weights"),
        )


def _inside(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        low, high = wanted
        return value >= low and (high is None or value <= high)
    return bool(value == wanted)


def choose(shape: Shape, arch: str, sms: int) -> LaunchPlan:
    """The plan for a shape on an architecture ("sm_86") with so many multiprocessors; "interpreter" on the CPU."""
    rules = [rule for rule in (*user_rules(arch), *shipped_rules(arch)) if rule.holds(shape, sms)]
    names = ("path", "prep", "gemm", "weights")
    first = {name: next((v for rule in rules if (v := getattr(rule, name))), None) for name in names}
    return LaunchPlan(
        first["path"] or ("fused" if arch == INTERPRETER or shape.M <= DECODE_ROWS else "addmm"),
        first["prep"] or default_prep(shape),
        first["gemm"] or default_gemm(shape),
        first["weights"] or ("inline" if shape.M <= DECODE_ROWS else "scratch"),
    )


@lru_cache(maxsize=4096)
def choice(shape: Shape, arch: str, sms: int) -> LaunchPlan:
    """`choose`, cached: a call of a layer looks up its plan."""
    return choose(shape, arch, sms)


def bucket(tokens: int) -> int:
    """The M that stands for `tokens`: the next power of two. Plans are looked up and measured by it."""
    return 1 << max(0, tokens - 1).bit_length()


def family(arch: str) -> str:
    """The architecture whose table and code another one shares: "sm_100" of "sm_103", "sm_120" of "sm_121"."""
    number = arch.removeprefix("sm_")
    if number.isdecimal() and int(number) >= 100:
        return "sm_120" if int(number) >= 120 else "sm_100"
    return arch


@lru_cache
def shipped_rules(arch: str) -> tuple[Rule, ...]:
    path = TABLES / f"{family(arch)}.json"
    return read_rules(path) if path.is_file() else ()


@lru_cache
def user_rules(arch: str) -> tuple[Rule, ...]:
    """Read the table that `lorasb bench tune` wrote for this architecture; warn of a broken one, and leave it out."""
    path = user_table(arch)
    if path is None or not path.is_file():
        return ()
    try:
        return read_rules(path)
    except BROKEN as error:
        warnings.warn(
            f"{path} is not a table of kernels ({error}): taking the shipped one. `lorasb bench tune` writes a new one",
            stacklevel=2,
        )
        return ()


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The rules of a table.

    Raises:
        ValueError: it is not a table, or names a path or a condition that does not exist.
    """
    return tuple(Rule.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rules"])


def read_user_tables_from(folder: Callable[[], Path | None], machine: Callable[[], dict[str, object]]) -> None:
    """Set the functions that return the folder of a user's own tables, and the card and driver that they hold for."""
    global _user_tables, _machine
    _user_tables, _machine = folder, machine
    forget()


def user_table(arch: str) -> Path | None:
    """Path of a user's own table for an architecture; None if no table of a user is read."""
    folder = None if _user_tables is None else _user_tables()
    return None if folder is None else folder / f"{arch}.json"


def forget() -> None:
    """Read the tables again at the next choice."""
    global generation
    generation += 1
    for cached in (choice, shipped_rules, user_rules):
        cached.cache_clear()


def default_prep(shape: Shape) -> PrepConfig:
    """Blocks that compile without spilling on sm_80 to sm_90, for what has no table.

    What takes registers are fp32 sums, block_m x (padded ranks of all members), and in fp32 the operands: more ranks or
    members take fewer columns of x per step, or fewer rows.
    """
    if shape.M <= DECODE_ROWS:
        return PrepConfig(16, 32 if shape.members > 2 else 64, 4, 3)
    if shape.dtype == "fp32" or shape.r > 128:
        return PrepConfig(32, 16, 4, 3)
    wide = shape.op == "forward" and shape.members > 2
    return PrepConfig(64, 16 if wide else 32 if shape.members > 1 else 64, 4, 4 if wide else 3)


def default_gemm(shape: Shape) -> GemmConfig:
    """Blocks that compile without spilling on sm_80 to sm_90; two programs per multiprocessor in 16 bits."""
    if shape.M <= DECODE_ROWS:
        return GemmConfig(16, 64, 64, 1, 4, 3)
    if shape.dtype == "fp32":
        return GemmConfig(128, 64, 16, 8, 8, 3)
    return GemmConfig(128, 128, 32, 8, 8, 4, registers=128) if shape.M > 64 else GemmConfig(64, 64, 32, 8, 4, 4)
