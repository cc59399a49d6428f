"""Private names of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from . import Private, find

VERIFIED = "PEFT 0.21"


class _Nothing:
    """A class without instances."""


def _own_features(layer: nn.Module) -> tuple[int | None, int | None]:
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


def _refuse_all_linear(config: Any, _: nn.Module) -> Any:
    if config.target_modules == "all-linear":
        raise ValueError(f'target_modules="all-linear" needs {VERIFIED}, this is another release: name the modules')
    return config


PRIVATE = {
    "in_out_features": Private(
        "peft.tuners.tuners_utils._get_in_out_features",
        "sizes of another quantizer's linear layer",
        "the layer's `in_features` and `out_features`",
        _own_features,
    ),
    "ExcludedModule": Private(
        "peft.tuners.tuners_utils._ExcludedModule",
        "tells modules in `exclude_modules` from others that do not match",
        "`exclude_modules` is ignored for experts of `target_parameters`",
        _Nothing,
    ),
    "include_all_linear": Private(
        "peft.tuners.tuners_utils._maybe_include_all_linear_layers",
        'resolves `target_modules="all-linear"`',
        "`all-linear` is refused: name the modules",
        _refuse_all_linear,
    ),
}

in_out_features: Callable[[nn.Module], tuple[int | None, int | None]] = find(PRIVATE["in_out_features"])
ExcludedModule: type = find(PRIVATE["ExcludedModule"])
include_all_linear: Callable[[Any, nn.Module], Any] = find(PRIVATE["include_all_linear"])
