"""Public names and signatures of release 0.2.0 stay: new ones may be added, former ones are deprecated for a release."""

from __future__ import annotations

import inspect
import json
from operator import attrgetter
from pathlib import Path

import pytest

import lorasb

# Name, or class and method -> parameters with their defaults; null for what has no signature.
RELEASED = json.loads((Path(__file__).parents[1] / "data" / "public_api.json").read_text(encoding="utf-8"))
DEPRECATED = {"LoRASBLinear.settle_dtypes"}  # passes all arguments on to the new name


def parameters(name: str) -> list[str]:
    found = inspect.signature(attrgetter(name)(lorasb)).parameters.values()
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found]


def test_no_public_name_is_gone() -> None:
    assert {name.partition(".")[0] for name in RELEASED} <= set(lorasb.__all__)


@pytest.mark.parametrize("name", [name for name, expected in RELEASED.items() if expected is not None])
def test_a_signature_takes_what_it_took(name: str) -> None:
    found = parameters(name)
    if name in DEPRECATED:
        assert found[-2:] == ["*arguments", "**options"]
        return
    # new parameters come after those that may be passed by position
    assert [one for one in found if one in RELEASED[name]] == RELEASED[name]
