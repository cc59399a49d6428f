"""Finds modules that are missing from the base's checkpoint: their weights differ after every load, so they cannot be
adapted, and go into modules_to_save instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..compat.transformers import hook_of, is_loaded
from ..config.adapter import ALL_LINEAR, LoRASBConfig
from ..quantization.quantized_weight import is_quantized

HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "logits_proj")
# Heads of task models that have no base model attribute, as their layers hang on the task model itself.
HEADS_WITHOUT_BASE = (*HEADS, "fc", "head", "projector")
TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|XVector)")
POOLERS = ("pooler",)  # part of a base model, but missing from checkpoints that were pretrained without one
# Perceiver's task models pass these to the base model's constructor, so they are inside it and still task-specific.
TASK_MODULES_IN_BASE = ("perceiver.decoder", "perceiver.input_preprocessor")


def save_heads(model: nn.Module, config: LoRASBConfig) -> None:
    """Add modules that are missing from the base's checkpoint to modules_to_save."""
    heads = [name for name, _ in model.named_children() if name in HEADS]
    # A loaded config, or one with a fingerprint, has its modules_to_save: the file on disk must match them exactly.
    if not config.from_file and config.base_fingerprint is None:
        task = TASKS.search(type(model).__name__)
        heads += [name for name in missing_from_checkpoint(model) if task or _targeted(model, config, name)]
    if heads:
        config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *heads])]


def _targeted(model: nn.Module, config: LoRASBConfig, name: str) -> bool:
    """True if a linear inside the module is a target; a model without a task may not use the module at all."""
    if config.target_modules in (None, ALL_LINEAR):
        return True
    linears = (n for n, m in model.get_submodule(name).named_modules(prefix=name) if isinstance(m, nn.Linear))
    return any(check_target_module_exists(config, linear) is True for linear in linears)


def missing_from_checkpoint(model: nn.Module) -> list[str]:
    """Names of modules whose weights are not in the base's checkpoint, in the model's order."""
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None:
        return []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    missing = set(_randomly_initialized(model, output))
    # A model with output embeddings is a language model, whose head comes with the checkpoint.
    if output is None:
        task, base = TASKS.search(type(model).__name__), getattr(model, prefix, None)
        for name, module in model.named_modules():
            inside = name.rpartition(".")[2] in POOLERS or (task and name in TASK_MODULES_IN_BASE)
            if inside and not _all_loaded(module):
                missing.update(_names_to_save(model, name, module))
        for name, child in model.named_children() if task else ():
            if child is not base and (isinstance(base, nn.Module) or name in HEADS_WITHOUT_BASE):
                missing.update(_names_to_save(model, name, child))
    below = tuple(f"{name}." for name in missing)
    return [name for name, _ in model.named_modules() if name in missing and not name.startswith(below)]


def _all_loaded(module: nn.Module) -> bool:
    """True if transformers marked every parameter of the module as loaded; an earlier adapter's do not count."""
    adapted = [name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    inside = tuple(f"{name}." if name else "" for name in adapted)
    base = tuple(f"{prefix}base_layer." for prefix in inside)
    return all(
        is_loaded(parameter)
        for name, parameter in module.named_parameters()
        if not name.startswith(inside) or name.startswith(base)
    )


def _names_to_save(model: nn.Module, name: str, module: nn.Module) -> Iterator[str]:
    """Yield names for modules_to_save: the module's own, or those of its children."""
    if not any(isinstance(submodule, nn.Linear) for submodule in module.modules()):
        return
    module = _unwrapped(module)
    children = [(f"{name}.{n}", child) for n, child in module.named_children() if any(True for _ in child.parameters())]
    others = [n for n, _ in model.named_modules() if n != name and not n.startswith(f"{name}.")]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # PEFT cannot wrap them: they have no forward
        yield from (child_name for child_name, _ in children)
    elif children and any(n.endswith(name) for n in others):  # PEFT matches modules_to_save by suffix
        for child_name, child in children:
            yield from _names_to_save(model, child_name, child)
    # Norms next to a single linear stay frozen: they start as ones and zeros at every load.
    elif len(children) == 1 and name not in HEADS and isinstance(_unwrapped(children[0][1]), nn.Linear):
        yield children[0][0]
    else:
        yield name


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT has wrapped in ModulesToSaveWrapper for an earlier adapter, or the module itself."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def _randomly_initialized(model: nn.Module, output: nn.Module | None) -> Iterator[str]:
    """Linears that transformers initialized itself: they lack the mark that loading leaves on parameters."""
    plain: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is output or ".modules_to_save." in name:
            continue
        # accelerate's offloading hooks and parametrizations replace parameters, and the new ones lack the mark
        if not is_quantized(module) and hook_of(module) is None and not hasattr(module, "parametrizations"):
            plain[name.removesuffix(".original_module").removesuffix(".base_layer")] = module
    unmarked = [n for n, m in plain.items() if not is_loaded(m.weight)]
    # If half of the linears or more lack the mark, transformers did not load the model (it was built from a config),
    # and a missing mark says nothing.
    if 0 < len(unmarked) < len(plain) / 2:
        yield from unmarked
