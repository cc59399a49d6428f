"""One adapter per batch row, `model(**batch, adapter_names=["one", "__base__", "two"])`, by forward pre-hooks that pass
the names to every layer as a keyword argument and are removed after the call.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..compat.transformers import CHECKPOINTING, WRAPPED_CHECKPOINTING
from ..constants import BASE_ROW
from ..layers.adapted_layer import AdaptedLayer
from ..layers.adapter_state import TOKENS_FIRST, Rows, chooses_tokens, length_mismatch, rows_of
from ..layers.linear import trains_by_row
from ..layers.unfused_experts import OpenExperts
from ..layers.weight_adapter import OpenParameters
from .bank import AdapterBank, bank_of

Forward = Callable[..., object]
Hook = tuple[nn.Module, Forward]  # a module, and a forward pre-hook that takes keyword arguments
Args = tuple[object, ...]
Kwargs = dict[str, object]
Shapes = dict[str, torch.Size]  # [B, T] of hidden states, by the module's name
_current: ContextVar[Sequence[Hook]] = ContextVar("hooks", default=())  # hooks of this thread's innermost block


class _Checkpointing:
    """A module's checkpointing function, wrapped so that backward recomputes a forward with that forward's hooks."""

    def __init__(self, function: Forward) -> None:
        self.function = function

    def __call__(self, forward: Forward, *args: object, **options: object) -> object:
        hooks = _current.get()

        def repeated(*args: object, **options: object) -> object:
            """Run the forward, with the hooks of its block if they are not in place."""
            with ExitStack() as stack:
                if _current.get() is not hooks:  # after the block, in another one, or in an autograd thread
                    _register(hooks, stack)
                return forward(*args, **options)

        return self.function(repeated if hooks else forward, *args, **options)


@contextmanager
def installed(modules: Iterable[nn.Module], hooks: Sequence[Hook]) -> Iterator[None]:
    """Install the hooks for this thread's forwards in the block, and for parts that backward recomputes."""
    training = (module for module in modules if module.training)  # only training checkpoints
    for module, name in itertools.product(training, (CHECKPOINTING, WRAPPED_CHECKPOINTING)):
        function = vars(module).get(name)
        if callable(function) and not isinstance(function, _Checkpointing):
            setattr(module, name, _Checkpointing(function))  # stays; without hooks it changes nothing
    with ExitStack() as stack:  # undoes everything, also when a forward raises
        _register(hooks, stack)
        token = _current.set(hooks)
        stack.callback(_current.reset, token)
        yield


def _register(hooks: Sequence[Hook], stack: ExitStack) -> None:
    for module, hook in hooks:
        stack.callback(module.register_forward_pre_hook(_OfThisThread(hook), with_kwargs=True).remove)


class _OfThisThread:
    """A hook that acts only in the thread that made it: another thread has its own rows, or none."""

    def __init__(self, hook: Forward) -> None:
        self.hook, self.owner = hook, threading.get_ident()
        self.names_rows = getattr(hook, "names_rows", False)  # `linear_group` reads it

    def __call__(self, *arguments: object) -> object:
        # a compiled forward has no other threads, and cannot call get_ident
        mine = torch.compiler.is_compiling() or threading.get_ident() == self.owner
        return self.hook(*arguments) if mine else None


# Sub-configs of multimodal models other than text_config: a row of an image or audio tower is not a text row.
TOWER_CONFIGS = ("vision_config", "audio_config")
Modules = dict[str, nn.Module]  # of a model, by name


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str], num_beams: int = 1) -> Iterator[None]:
    """Apply one adapter per row (`__base__`: none) in the forwards of this block; num_beams rows each in generation."""
    modules = dict(model.named_modules())  # only once: it takes as long as a small model's layers
    bank = bank_of(modules.values())
    known = _check(model, modules, names, bank)
    rows = Rows.of(names)
    with ExitStack() as stack:
        if bank is not None:
            # any other name is in the bank, or was removed meanwhile: a KeyError
            slots = stack.enter_context(bank.serving([BASE_ROW if name in known else name for name in rows.names]))
            rows = replace(rows, slots=torch.tensor(slots, dtype=torch.int64, device="cpu"), basis=bank.basis)
        checker = functools.partial(_check_length, len(rows), num_beams)
        hooks: list[Hook] = [(model, checker), *_hooks(model, modules, rows, num_beams)]
        stack.enter_context(installed(modules.values(), hooks))
        yield


def _hooks(model: nn.Module, modules: Modules, rows: Rows, num_beams: int) -> Iterator[Hook]:
    encoder, outside_text, shapes = _encoder(model), _outside_text_model(model), Shapes()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    layers = _layers(modules)
    ancestors = {name.rsplit(".", i)[0] for name in layers for i in range(1, name.count(".") + 1)}
    beams = rows.repeat_interleave(num_beams)  # as in generate(): num_beams consecutive copies of each row
    for name, module in modules.items():
        if name in layers:
            layer_rows = rows if module in encoder else beams
            ambiguous = module in outside_text or chooses_tokens(name)
            yield module, _NamePasser(name, layer_rows, shapes, model_type in TOKENS_FIRST, ambiguous)
        # a complete model (it has get_input_embeddings) may get other floating-point inputs before hidden states
        elif name in ancestors and not hasattr(module, "get_input_embeddings"):
            yield module, functools.partial(_record_shape, name, shapes)


def _check(model: nn.Module, modules: Modules, names: Sequence[str], bank: AdapterBank | None) -> set[str]:
    """Raise if rows cannot use these adapters; return the names that the model itself has."""
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected adapter_names as a list, a name for each row, got {names!r}")
    compiled = [name for name, module in modules.items() if getattr(module, "_compiled_call_impl", None) is not None]
    if compiled := compiled or [name for name in modules if name.endswith("_orig_mod")]:
        raise ValueError(
            f"expected no separately compiled module with `adapter_names`, but {compiled[0] or 'its base'!r} is "
            "compiled by itself, which would ignore them: torch.compile(model), or compile none of its modules"
        )
    layers = [module for module in modules.values() if isinstance(module, AdaptedLayer)]
    known = {name for layer in layers for name in layer.lorasb_R}
    distinct = sorted(set(names) - {BASE_ROW})
    unknown = [name for name in distinct if name not in known and (bank is None or name not in bank)]
    if unknown:
        there = ", ".join(sorted(known)) + ("" if bank is None else f", and its bank {len(bank)} others")
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {there}")
    twice = [name for name in distinct if bank is not None and name in known and name in bank]
    if twice:
        raise ValueError(f"both the model and its bank have an adapter {twice[0]!r}: bank.remove({twice[0]!r})")
    in_training = model.training and bank is not None
    if in_training and any(getattr(m, "gradient_checkpointing", False) for m in modules.values()):
        raise ValueError(
            "expected no gradient checkpointing with `adapter_names` of a bank in training, as its adapters may have "
            "changed by the time backward recomputes the forward: model.gradient_checkpointing_disable()"
        )
    cores = (layer.lorasb_R[name] for layer in layers for name in distinct if name in layer.lorasb_R)
    if model.training and any(hasattr(core, "device_mesh") for core in cores):  # DTensors
        raise ValueError("FSDP2 would add gradients of different adapters: train by `adapter_names` with DDP")
    if model.training and not all(trains_by_row(layer, distinct) for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(), or train adapters on "
            "one basis (LoRASBConfig(basis=...), without dropout), which a batch may have together"
        )
    opened = [name for name, module in modules.items() if isinstance(module, OpenParameters)]
    if opened:
        raise ValueError(f"{opened[0]!r} is adapted for all rows at once (target_parameters): use model.set_adapter")
    return known


def _layers(modules: Modules) -> Modules:
    """Modules that take adapter names; unfused experts pass names on to the linears inside them."""
    # the trailing dot: "experts." is no prefix of "experts_norm"
    opened = tuple(f"{name}." for name, module in modules.items() if isinstance(module, OpenExperts))
    kinds = (AdaptedLayer, AuxiliaryTrainingWrapper, OpenExperts)
    return {n: m for n, m in modules.items() if isinstance(m, kinds) and not n.startswith(opened)}


def _encoder(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder: generation runs it once per row, before rows are repeated for beams."""
    config = getattr(model, "config", None)
    if not any(getattr(one, "is_encoder_decoder", False) for one in (config, getattr(config, "text_config", None))):
        return set()  # with only one stack, `get_encoder` returns that one
    encoder = getattr(model, "get_encoder", lambda: None)()
    return set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()


def _outside_text_model(model: Any) -> set[nn.Module]:
    """Modules outside the text model of a multimodal one: a batch row may have several images, or none."""
    config = getattr(model, "config", None)
    if not hasattr(config, "text_config") or not any(hasattr(config, name) for name in TOWER_CONFIGS):
        return set()
    text_models = [model.get_decoder() if hasattr(model, "get_decoder") else model, model.get_output_embeddings()]
    text = {module for part in text_models if isinstance(part, nn.Module) for module in part.modules()}
    return set(model.modules()) - text


def _check_length(rows: int, num_beams: int, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Pre-hook of the model: raise if the batch and the names differ in length."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    first = next((x for x in (*named, *args[:1]) if isinstance(x, Tensor)), None)
    if first is None:
        tensors = [x for x in kwargs.values() if isinstance(x, Tensor)]
        first = tensors[0] if len(tensors) == 1 else None  # with several, it is unknown which has a row per name
    if first is not None and first.dim() > 0 and len(first) not in (rows, rows * num_beams):
        raise ValueError(length_mismatch(len(first), rows))


def _record_shape(name: str, shapes: Shapes, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Pre-hook that records the shape [B, T] of hidden states [B, T, hidden], to map flattened tokens to rows."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    first = next(tensors, None)
    if first is not None and first.dim() == 3:
        shapes[name] = first.shape[:2]
    else:
        shapes.pop(name, None)  # an earlier call's shape must not be mistaken for this call's


@dataclass(eq=False)  # like other hooks, equal only to itself
class _NamePasser:
    """Pre-hook that passes a layer the adapter names of its input's rows, or raises if they are unknown."""

    name: str
    rows: Rows
    shapes: Shapes
    tokens_first: bool
    ambiguous: bool
    names_rows = True  # it changes nothing else; `linear_group` reads this

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        # The layer's input, however the caller passed it: `layer(x)` or `layer(hidden_states=x)`.
        x: Any = args[0] if args else next(iter(kwargs.values()))
        ambiguous = self.ambiguous and not isinstance(module, OpenExperts)
        # With one name for all rows the mapping does not matter; with several, never guess from a matching row count.
        refused = ambiguous and len(self.rows.names) > 1
        outer = self._outer_shape() if x.dim() <= 2 else None  # only needed for flattened tokens
        input_rows = None if refused else rows_of(x, self.rows, outer, self.tokens_first or ambiguous)
        if input_rows is None:
            raise ValueError(
                f"expected adapter_names for each of {len(x)} rows, got {len(self.rows)}: layer {self.name!r} gets "
                f"{list(x.shape)}, which cannot be mapped to rows of the batch. Give a name for each "
                "row of the batch; if you do, run one adapter at a time: model.set_adapter(name)"
            )
        # PEFT's wrappers of modules_to_save take a list of names; LoRA-SB layers take `Rows`.
        if not isinstance(module, AuxiliaryTrainingWrapper):
            return args, kwargs | {"adapter_names": input_rows}
        names = [name if name in module._adapters else BASE_ROW for name in input_rows.to_list()]
        return args, kwargs | {"adapter_names": names}

    def _outer_shape(self) -> torch.Size | None:
        name = self.name
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.shapes:
                return self.shapes[name]
        return None
