"""An adapter for each row of a batch: `model(**batch, adapter_names=["one", "__base__", "two"])`, as PEFT's LoRA does.

The names travel to every layer as a keyword argument of its forward, put there by hooks that last for one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .linear import BASE_ROW, LoRASBLinear


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str], num_beams: int = 1) -> Iterator[None]:
    """Give each row of the next forwards its adapter; `__base__` is none.

    Args:
        model: with LoRA-SB layers, in evaluation mode.
        names: an adapter's name for each row of the input.
        num_beams: rows that generation makes of each, in a decoder.

    Raises:
        ValueError: the model trains, or a name that no layer has.
        TypeError: names that are no list.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"expected adapter_names as a list, a name for each row, got {names!r}")
    if model.training:
        raise ValueError("adapter_names are for evaluation: call model.eval(), or train one adapter at a time")
    layers = [m for m in model.modules() if isinstance(m, LoRASBLinear | AuxiliaryTrainingWrapper)]
    known = {name for layer in layers if isinstance(layer, LoRASBLinear) for name in layer.lorasb_R}
    unknown = sorted(set(names) - known - {BASE_ROW})
    if unknown:
        raise ValueError(f"no layer has an adapter {', '.join(map(repr, unknown))}: the model has {sorted(known)}")
    find: Any = getattr(model, "get_encoder", lambda: None)
    encoder = find()
    inside = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    beams = [name for name in names for _ in range(num_beams)]
    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.register_forward_pre_hook(
                _adding(list(names) if layer in inside else beams), with_kwargs=True
            )
            hooks.callback(handle.remove)
        yield


def _adding(names: list[str]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    return hook
