"""YAML files of settings: read by `--config`, and written to the folder of a run so that it can be repeated."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any

from ..utils.atomic_files import write_text
from ..utils.reading import Json, read_text
from .settings import Settings, listed


def as_name(written: object) -> str:
    """A setting's name as in Python, from one that may be written as an option."""
    return str(written).removeprefix("--").replace("-", "_")


Given = Json  # settings by name
CONFIG_NAME = "config.yaml"
ALIASES = {as_name(alias): one.name for one, _ in listed(Settings) for alias in one.metadata.get("also", ())}
# type of a setting -> what to call it, and the types that a value may have (YAML 1.1 reads 2e-3 as text)
TYPES: dict[object, tuple[str, type | UnionType]] = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", int | float | str),
    str: ("a text", str | int),
}


AUTO = tuple(one.name for one, kind in listed(Settings) if kind is float and one.default is None)  # found from the data


def read_config(path: str | Path, known: Mapping[str, object]) -> Given:
    """The settings of a YAML file, by name."""
    import yaml  # `lorasb --help` does without

    given: Given = {}
    try:
        loaded = yaml.safe_load(read_text(path))
    except OSError as error:
        raise ValueError(f"--config {path}: expected a YAML file of settings ({error.strerror or error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path}: this is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected lines like `lr: 0.002`, got {type(loaded).__name__}")
    for written, value in loaded.items():
        name = ALIASES.get(as_name(written), as_name(written))
        if name not in known:
            hint = nearest(as_name(written), {*known, *ALIASES})
            raise ValueError(f"--config {path}: there is no setting {written!r}{hint}")
        if name in given:
            raise ValueError(f"--config {path}: {written!r} is another name of {name!r}, which the file has too")
        if value is not None:  # a null line (`eval_data:`) means the default, as an option that is left out does
            given[name] = typed(value, known[name], f"--config {path}: {name}")
    return given


def nearest(name: str, known: Collection[str], otherwise: str = "--help-all lists them", cutoff: float = 0.7) -> str:
    """The end of an error message: the known name that is close to one that is not, or where to find them."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f": did you mean {near[0]!r}?" if near else f": {otherwise}"


def typed(value: object, kind: Any, where: str) -> Any:
    """Convert a value from YAML or the command line to its setting's type."""
    if kind not in TYPES:
        return _ranks(value, where)
    if kind is float and value == "auto":  # found from the data, as --epochs
        return None
    if isinstance(value, TYPES[kind][1]) and isinstance(value, bool) == (kind is bool):  # bool is a subclass of int
        with suppress(ValueError):
            return kind(value)
    what = TYPES[kind][0] + (" or auto" if where.endswith(AUTO) else "")
    raise ValueError(f"{where} expects {what}, got {value!r}")


def _ranks(value: object, where: str) -> dict[str, int]:
    """Ranks by layer name, from a mapping, JSON, or name=rank,name=rank."""
    ranks = value
    with suppress(ValueError):
        if isinstance(value, str):
            pairs = (part.partition("=") for part in value.split(","))
            ranks = json.loads(value) if value.lstrip().startswith("{") else {n: int(r) for n, _, r in pairs}
        if isinstance(ranks, dict) and all(isinstance(rank, int) and str(name) for name, rank in ranks.items()):
            return {str(name).strip(): rank for name, rank in ranks.items()}
    raise ValueError(f"{where} expects ranks by name, like down_proj=96,q_proj=32 or JSON, got {value!r}")


def write_config(path: Path, settings: Settings) -> None:
    """Write settings as YAML for `--config`, atomically."""
    import yaml

    values = {setting.name: getattr(settings, setting.name) for setting, _ in listed(type(settings))}
    values.pop("resume", None)  # applies to one start of a run, not to a repetition
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


PRESETS = Path(__file__).with_name("presets")


def preset_names() -> list[str]:
    """The presets, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_preset(name: str) -> Path:
    """A preset's file."""
    known = preset_names()
    if name not in known:
        hint = nearest(name, known, f"known are {', '.join(known)}", cutoff=0.4)
        raise ValueError(f"--preset {name!r}: there is no such preset{hint}")
    return PRESETS / f"{name}.yaml"
