"""What a checkpoint of the base model does not bring: a task's head, a pooler, what transformers had to make up.

Such weights are drawn anew at every load. Nothing can be adapted on them that another process could load, so that they
are trained whole and saved with the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.parameter_dicts import LOADED
from ..quantization.quantized_weight import is_quantized
from .config import ALL_LINEAR

if TYPE_CHECKING:
    from .config import LoRASBConfig

HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "logits_proj")
WITHOUT_BASE = (*HEADS, "fc", "head", "projector")  # of task models whose parts are not in one base model
TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|XVector)")
INSIDE = ("pooler",)  # in a base model, and not in the checkpoints of all that were pretrained without one
HANDED_IN = ("perceiver.decoder", "perceiver.input_preprocessor")  # parts of a task that the base model is given


def save_heads(model: nn.Module, config: LoRASBConfig) -> None:
    """Name in modules_to_save what the base's checkpoint does not bring; an adapter that exists knows its own."""
    heads = [name for name, _ in model.named_children() if name in HEADS]
    if not config.from_file and config.base_fingerprint is None:
        task = TASKS.search(type(model).__name__)
        heads += [name for name in not_brought(model) if task or _targeted(model, config, name)]
    if heads:
        config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *heads])]


def _targeted(model: nn.Module, config: LoRASBConfig, name: str) -> bool:
    """Whether a linear of a module would be adapted: a model without a task may not even use it."""
    if config.target_modules in (None, ALL_LINEAR):
        return True
    linears = (n for n, m in model.get_submodule(name).named_modules(prefix=name) if isinstance(m, nn.Linear))
    return any(check_target_module_exists(config, linear) is True for linear in linears)


def not_brought(model: Any) -> list[str]:
    """Names of modules whose weights a base checkpoint does not bring, in the model's order."""
    if not hasattr(model, "base_model_prefix"):
        return []
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = set(_made_up(model, output))
    if output is None:
        found.update(_heads(model))
        found.update(_poolers(model))
    return [name for name, module in model.named_modules() if name in found and not _inside_another(name, found)]


def _heads(model: Any) -> Iterator[str]:
    """A task model's modules beside its base model."""
    if not TASKS.search(type(model).__name__):
        return
    for name, module in model.named_modules():
        if name in HANDED_IN and not _brought(module):
            yield from _parts(model, name, module)
    base = getattr(model, model.base_model_prefix, None)
    for name, child in model.named_children():
        if child is not base and (isinstance(base, nn.Module) or name in WITHOUT_BASE):
            yield from _parts(model, name, child)


def _poolers(model: nn.Module) -> Iterator[str]:
    """Poolers that no checkpoint is known to have brought."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in INSIDE and not _brought(module):
            yield from _parts(model, name, module)


def _brought(module: nn.Module) -> bool:
    """Whether transformers marked all of a module as loaded."""
    return all(getattr(parameter, LOADED, False) for parameter in module.parameters())


def _parts(model: nn.Module, name: str, module: nn.Module) -> Iterator[str]:
    """A module with linears; or its parts, where one is all that has parameters, it is a list, or its name is no help.

    Norms outside of what is named start as ones and zeros at every load, and stay so.
    """
    if not any(isinstance(part, nn.Linear) for part in module.modules()):
        return
    module = _own(module)
    children = [(f"{name}.{n}", child) for n, child in module.named_children() if any(True for _ in child.parameters())]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield from (inner for inner, _ in children)
    elif children and _ends_another(model, name):
        for inner, child in children:
            yield from _parts(model, inner, child)
    elif len(children) == 1 and name not in HEADS and isinstance(_own(children[0][1]), nn.Linear):
        yield children[0][0]
    else:
        yield name


def _own(module: nn.Module) -> nn.Module:
    """The model's own module, where PEFT has wrapped it to save it with another adapter."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def _ends_another(model: nn.Module, name: str) -> bool:
    """Whether PEFT, which compares the ends of names, would take another module for this one."""
    return any(n.endswith(name) and n != name and not n.startswith(f"{name}.") for n, _ in model.named_modules())


def _made_up(model: nn.Module, output: nn.Module | None) -> Iterator[str]:
    """Linears that transformers had to initialize when it loaded the others: the mark of what was loaded is missing."""
    linears = {
        name.removesuffix(".original_module").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and ".modules_to_save." not in name
    }
    moved = ("_hf_hook", "parametrizations")  # these may have new parameters, without the mark
    plain = {
        name: module
        for name, module in linears.items()
        if not is_quantized(module) and not any(hasattr(module, attribute) for attribute in moved)
    }
    unmarked = [n for n, m in plain.items() if not getattr(m.weight, LOADED, False)]
    if 0 < len(unmarked) < len(plain) / 2:
        yield from unmarked


def _inside_another(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))
