"""An adapter for each row of a batch: `model(**batch, adapter_names=["one", "__base__", "two"])`, as PEFT's LoRA does.

The names travel to every layer as a keyword argument of its forward, put there by hooks that last for one call. Where a
layer gets tokens and not rows, the module around it that got [B, T, ...] says how many tokens a row has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..constants import BASE_ROW
from ..layers.linear import LoRASBLinear
from ..layers.token_rows import TOKENS_FIRST, Rows, chooses_tokens, rows_of
from ..layers.unfused_experts import OpenExperts

TOWERS = ("vision_config", "audio_config")  # beside a text_config: rows of pictures or sounds are not the text's


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str], num_beams: int = 1) -> Iterator[None]:
    """Give each row of the next forwards its adapter; `__base__` is none.

    Args:
        model: with LoRA-SB layers, in evaluation mode.
        names: an adapter's name for each row of the input.
        num_beams: rows that generation makes of each, in a decoder.

    Raises:
        ValueError: the model trains, or a name that no layer has; in a forward, a layer whose input cannot be told
            apart into the batch's rows, where rows ask for different adapters.
        TypeError: names that are no list.
    """
    _check(model, names)
    encoder, unclear, shapes = _encoder(model), _beside_the_text(model), dict[str, torch.Size]()
    rows, family = Rows.of(names), getattr(getattr(model, "config", None), "model_type", None)
    beams = rows.repeat_interleave(num_beams)
    layers = _layers(model)
    around = {name.rsplit(".", i)[0] for name in layers for i in range(1, name.count(".") + 1)}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hook: Any = None
            if name in layers:
                own = rows if module in encoder else beams
                hook = _Adding(name, own, shapes, family in TOKENS_FIRST, module in unclear or chooses_tokens(name))
            elif name in around and not hasattr(module, "get_input_embeddings"):  # those get more than hidden states
                hook = _Noting(name, shapes)
            if hook is not None:
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _check(model: nn.Module, names: Sequence[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"expected adapter_names as a list, a name for each row, got {names!r}")
    if model.training:
        raise ValueError("adapter_names are for evaluation: call model.eval(), or train one adapter at a time")
    known = {name for layer in model.modules() if isinstance(layer, LoRASBLinear) for name in layer.lorasb_R}
    unknown = sorted(set(names) - known - {BASE_ROW})
    if unknown:
        raise ValueError(f"no layer has an adapter {', '.join(map(repr, unknown))}: the model has {sorted(known)}")


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """What takes names, by its own name; opened experts hand them to their linears themselves."""
    opened = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, OpenExperts))
    kinds = (LoRASBLinear, AuxiliaryTrainingWrapper, OpenExperts)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith(opened)}


def _encoder(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder, which generation runs before it makes beams."""
    find: Any = getattr(model, "get_encoder", lambda: None)
    encoder = find()
    return set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()


def _beside_the_text(model: Any) -> set[nn.Module]:
    """The modules of a language model's other inputs: a row may have several pictures, or none."""
    config = getattr(model, "config", None)
    if not hasattr(config, "text_config") or not any(hasattr(config, name) for name in TOWERS):
        return set()
    parts = [model.get_decoder() if hasattr(model, "get_decoder") else model, model.get_output_embeddings()]
    text = {module for part in parts if isinstance(part, nn.Module) for module in part.modules()}
    return set(model.modules()) - text


class _Noting:
    """Keeps the shape [B, T] of the hidden states that a module gets."""

    def __init__(self, name: str, shapes: dict[str, torch.Size]) -> None:
        self.name, self.shapes = name, shapes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        first = next(tensors, None)
        if first is not None and first.dim() == 3:
            self.shapes[self.name] = first.shape[:2]
        else:
            self.shapes.pop(self.name, None)


class _Adding:
    """Gives a layer the names for what it gets, or refuses."""

    def __init__(self, name: str, rows: Rows, shapes: dict[str, torch.Size], tokens_first: bool, unclear: bool) -> None:
        self.name, self.rows, self.shapes = name, rows, shapes
        self.tokens_first, self.unclear = tokens_first, unclear

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else next(iter(kwargs.values()))
        unclear = self.unclear and not isinstance(module, OpenExperts)
        refused = unclear and len(self.rows.names) > 1
        found = None if refused else rows_of(x, self.rows, self._outer(), self.tokens_first or unclear)
        if found is None:
            raise ValueError(
                f"expected adapter_names for each of {len(x)} rows, got {len(self.rows)}: layer {self.name!r} gets "
                f"{list(x.shape)}, and which of the batch's rows these belong to cannot be told. Give a name for each "
                "row of the batch; where that is so, run one adapter at a time: model.set_adapter(name)"
            )
        names: Any = found.to_list() if isinstance(module, AuxiliaryTrainingWrapper) else found
        return args, kwargs | {"adapter_names": names}

    def _outer(self) -> torch.Size | None:
        """What the nearest module around the layer got that got [B, T, ...]."""
        name = self.name
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.shapes:
                return self.shapes[name]
        return None
