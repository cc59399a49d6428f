"""The rules of settings: what a value must be, and what does not go together, by the names of the command line."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..constants import MAX_RANK
from ..utils.checks import MAX_LR, check_pattern


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def check(settings: Any) -> None:
    """Check a dataclass of settings against the rules of its fields.

    Raises:
        ValueError: a value breaks a rule; the first one is named.
    """
    for item in fields(settings):
        value, rules = getattr(settings, item.name), item.metadata
        if "help" not in rules or (value is None and item.default is None):
            continue
        if value is None:
            raise ValueError(f"{option(item.name)} expects a value, got auto, which --epochs and --eta take")
        if "choices" in rules and value not in rules["choices"]:
            raise ValueError(f"{option(item.name)} must be one of {', '.join(rules['choices'])}, got {value!r}")
        if rules.get("positive") and not 0 < value < math.inf:
            raise ValueError(f"{option(item.name)} must be positive, got {value!r}")
        find_problem: Callable[[Any], str | None] | None = rules.get("check")
        problem = find_problem(value) if find_problem else None
        if problem:
            raise ValueError(f"{option(item.name)} {problem}, got {value!r}")


def wrong_share(value: float) -> str | None:
    """A share in [0, 1)."""
    return None if 0 <= value < 1 else "is a share in [0, 1)"


def wrong_if_negative(value: float) -> str | None:
    """Zero or more."""
    return None if value >= 0 else "must not be negative"


def wrong_if_unnamed(value: str) -> str | None:
    """A folder's name: an empty one would be the current folder, which a run clears of checkpoints."""
    return None if value.strip() else "has to name a folder"


def wrong_bits(value: int) -> str | None:
    """4 or 16."""
    return None if value in (4, 16) else "must be 4 or 16"


def wrong_rate(value: float) -> str | None:
    """A learning rate."""
    return None if 0 < value <= MAX_LR else f"must be positive, at most {MAX_LR:g}"


def wrong_targets(value: str) -> str | None:
    """Names, or a regular expression that matches in time."""
    if target_names(value) is None:
        try:
            check_pattern(value, "it")
        except ValueError as error:
            return f"must be names or a pattern: {error}"
    return None


def target_names(value: str) -> list[str] | None:
    """The names in a comma-separated list; None for a regular expression."""
    names = [name.strip() for name in value.split(",")]
    return names if all(re.fullmatch(r"[\w.-]+", name) for name in names) else None


def wrong_save_steps(value: str) -> str | None:
    """A number of steps, or auto."""
    whole = value.isdigit() and int(value) > 0
    return None if value == "auto" or whole else "must be auto or a positive number of steps"


def wrong_ranks(value: dict[str, int]) -> str | None:
    """Positive ranks."""
    return None if all(rank > 0 for rank in value.values()) else "must have positive ranks"


def check_rank(settings: Any) -> None:
    """Raise a ValueError for a rank above what the kernels take; plain LoRA has no such limit."""
    ranks = [settings.r or 0, *(settings.rank_pattern or {}).values()]
    if settings.method != "lora" and max(ranks) > MAX_RANK:
        raise ValueError(f"--r must be at most {MAX_RANK}, got {max(ranks)}: a layer trains r x r numbers")


def check_model(model: str) -> None:
    """Raise a ValueError for a model that is written as a path and is no folder: the hub would call it a bad id."""
    path = Path(model).expanduser()
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not path.is_dir():
        raise ValueError(f"--model {model}: there is no such folder; a hub id is like HuggingFaceTB/SmolLM2-135M")


def check_score(score: str) -> None:
    """Raise an ImportError if a score needs a package that is not there."""
    if score == "symbolic" and importlib.util.find_spec("lark") is None:
        raise ImportError("--score symbolic needs sympy and lark: pip install 'lorasb[math]'")


def first_of(asked: Mapping[str, Any]) -> str | None:
    """The first name whose value is set; None if none is."""
    return next((name for name, on in asked.items() if on), None)


def check_reinforcement(settings: Any) -> None:
    """Raise a ValueError for what does not go with sampled completions."""
    if settings.generations < 2 or settings.batch_size % settings.generations:
        raise ValueError(
            f"--batch-size {settings.batch_size} counts completions with --rl: take a multiple of --generations, which "
            f"is two or more, got {settings.generations}"
        )
    if settings.rl == "verifier" and settings.data is not None:
        raise ValueError("--rl verifier is a generated task's own: with --data take --rl exact, or FILE.py:FUNCTION")
    if settings.rl_start == "rewards" and settings.method != "lora-sb":
        raise ValueError(f"--rl-start rewards is a start of --method lora-sb, got {settings.method}: leave it out")
    refused = {
        "--packing": settings.packing,
        "--find-lr": settings.find_lr,
        "--adapter-column": settings.adapter_column,
    }
    if found := first_of(refused):
        raise ValueError(f"{found} does not go with --rl, which samples completions of its own: leave one of them out")


def check_adapters(settings: Any) -> None:
    """Raise a ValueError for what adapters that are trained together cannot have."""
    if settings.data is None:
        raise ValueError("--adapter-column names an entry of the examples of --data, which is not given: name a file")
    refused = {
        "--method lora": settings.method == "lora",
        "--lora-dropout": settings.lora_dropout > 0,
        "--packing": settings.packing,
    }
    if found := first_of(refused):
        raise ValueError(
            f"--adapter-column trains the rows of a batch as those of different adapters, and {found} does not go with "
            "that: leave one of them out"
        )
