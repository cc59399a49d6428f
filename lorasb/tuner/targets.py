"""Target selection: which layers are adapted, and which modules are trained in full instead; and checks before a target
is replaced, before an initialization and before a merge.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.adapter_file import difference
from ..compat.accelerate import hook_of
from ..compat.transformers import is_loaded
from ..config.adapter import ALL_LINEAR, LoRASBConfig
from ..constants import DEFAULT_RANK
from ..layers import opaque_base, unfused_experts
from ..layers.adapted_layer import AdaptedLayer
from ..layers.base import weight_present
from ..layers.linear4bit import HEADS
from ..layers.lookup import any_merged, layers_with
from ..layers.opaque_base import check_linear, has_dense_weight, has_own_result, has_weight_values, make_base
from ..layers.weight_adapter import KINDS_WITH_WEIGHT, LoRASBEmbedding, OpenParameters, unfoldings
from ..quantization.quantized_weight import is_quantized, of_module

CORE = ".lorasb_R"  # in the keys of a state dict
# nn.MultiheadAttention's out_proj: its weight goes to a functional call, so a layer in its place would never run.
LINEARS_NOT_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


def without_wrapper(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def layers_named_in(state_dict: dict[str, Tensor]) -> dict[str, int]:
    cores = {key.rsplit(CORE, 1)[0]: value for key, value in state_dict.items() if CORE in key}
    return {without_wrapper(name): len(value) for name, value in cores.items()}


def check_targets(
    model: nn.Module, config: LoRASBConfig, targets: dict[str, nn.Module], state_dict: dict[str, Tensor] | None
) -> None:
    """Resolve the ranks of the targets (from `state_dict` if given); raise if one cannot be replaced."""
    if not targets and state_dict is None and isinstance(config.target_modules, set):
        refuse_unknown_names(model, config.target_modules)
    for name, module in targets.items():
        check_supported(name, module)
        if state_dict is None and not config.from_file and is_read_without_a_call(model, name):
            raise ValueError(
                f"target {name!r}: its block or the block's fused kernels read its weight without calling it, so an "
                "adapter would have no effect in training: name it in exclude_modules"
            )
    refuse_shared_embeddings(model, targets)
    check_opaque(targets, float_dtype(model), trained=not config.inference_mode)
    resolve_ranks(config, targets, state_dict or {})
    if config.base_fingerprint and not any_merged(model):  # merged values would not identify the base
        weights = {name: getattr(base_of(module), "weight", None) for name, module in targets.items()}
        reason = difference(weights, config.base_fingerprint)
        if reason:
            raise ValueError(
                f"this adapter was made on {config.base_model_name_or_path or 'another base model'}, and this base is "
                f"another one: {reason}. Load its base, or PeftModel.from_pretrained(base, folder, check_base=False)"
            )


def rank_for(config: LoRASBConfig, name: str) -> int:
    """The rank of a layer: its entry in rank_pattern (name or regex, matched as a suffix), else r."""
    key = get_pattern_key(list(config.rank_pattern), without_wrapper(name))
    return config.rank_pattern.get(key) or config.r or DEFAULT_RANK


def resolve_ranks(config: LoRASBConfig, targets: dict[str, nn.Module], state_dict: dict[str, Tensor]) -> None:
    """Set the default rank in the config, capped per layer in rank_pattern; raise if an explicit rank is too large."""
    uses_default, capped = config.r is None, {}
    if uses_default and state_dict and not config.rank_pattern:
        config.rank_pattern = {re.escape(name): rank for name, rank in layers_named_in(state_dict).items()}
    for name, module in targets.items():
        base = base_of(module)
        limit = min([one.largest_rank for one in unfoldings(base)] or make_base(base).shape)  # attention has several
        if rank_for(config, name) <= limit:
            continue
        if not uses_default or get_pattern_key(list(config.rank_pattern), without_wrapper(name)) in config.rank_pattern:
            last = name.rpartition(".")[2]
            raise ValueError(
                f"rank {rank_for(config, name)} is more than layer {name!r} allows: min(in_features, out_features) = "
                f"{limit}. Lower r, or give this layer its own: rank_pattern={{{last!r}: {limit}}} "
                f"(--rank-pattern {last}={limit})"
            )
        capped[re.escape(without_wrapper(name))] = limit  # escaped: keys of rank_pattern are regexes
    config.r, config.rank_pattern = config.r or DEFAULT_RANK, config.rank_pattern | capped


def is_read_without_a_call(model: nn.Module, name: str) -> bool:
    """True if the parent reads a layer's weight itself: always, or in training on a GPU as Mamba blocks do."""
    parent, _, child = name.rpartition(".")
    block = model.get_submodule(parent)
    text = _source(type(block))  # type: ignore[arg-type]  # classes are hashable
    return f"self.{child}.weight" in text and (hasattr(block, "A_log") or f"self.{child}(" not in text)


@cache  # reading a class parses its file
def _source(kind: type) -> str:
    """The source code of a class and its base classes."""
    text = ""
    for one in kind.__mro__:
        if one not in (nn.Module, object):
            with suppress(OSError, TypeError):  # defined in an interpreter, or compiled
                text += inspect.getsource(one)
    return text


def refuse_unknown_names(model: nn.Module, names: Collection[str]) -> None:
    """Raise a ValueError that suggests close names if no module has any of these names."""
    modules = [name for name, _ in model.named_modules()]
    if not names or any(name == n or name.endswith(f".{n}") for n in names for name in modules):
        return
    kinds = sorted({name.rpartition(".")[2] for name in modules} - {""})
    near = [match for name in sorted(names) for match in difflib.get_close_matches(name.rpartition(".")[2], kinds, 2)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"it has {', '.join(kinds[:12])}, ..."
    raise ValueError(f"target_modules: {', '.join(sorted(names))} not found in the base model: {hint}")


def filter_all_linear(model: nn.Module, config: LoRASBConfig) -> set[str]:
    """The names of "all-linear" without experts, routers, linears that are never called, and unselected blocks."""
    quantized = _layers_of_quantizers(model)  # PEFT leaves out those that do not derive from nn.Linear
    inside = tuple(f"{name}." for name in quantized)  # such as the original that HQQ may keep
    # linears inside a module that replaced them because their weight itself is a target
    opened = {f"{name}.base_layer" for name, module in model.named_modules() if isinstance(module, OpenParameters)}
    names = {
        n
        for n in {*(config.target_modules or ()), *quantized} - opened
        if not isinstance(model.get_submodule(n), LINEARS_NOT_CALLED)
        and unfused_experts.parameter_of(n) is None
        and not n.startswith(inside)
        and not is_read_without_a_call(model, n)
        and not {"original_module", "modules_to_save"} & set(n.split("."))  # another adapter's, trained in full
        and not has_own_result(model.get_submodule(n))  # routers that subclass nn.Linear (Llama 4's)
    }
    if config.layers_to_transform is None:  # PEFT ignores this option for the full names of "all-linear"
        return names
    block_indices = config.layers_to_transform
    block_indices = [block_indices] if isinstance(block_indices, int) else list(block_indices)
    list_names = config.layers_pattern or r"[^.]*"
    list_names = [list_names] if isinstance(list_names, str) else list_names
    index_matches = {n: re.match(rf"(?:^|.*?\.)(?:{'|'.join(list_names)})\.(\d+)\.", n) for n in names}
    return {name for name, match in index_matches.items() if match and int(match.group(1)) in block_indices}


def _layers_of_quantizers(model: nn.Module) -> set[str]:
    """Names of layers in a known quantized format that are not nn.Linear, without the output head, as in PEFT."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: set[str] = set()
    for name, module in model.named_modules():
        candidate = hasattr(module, "in_features") and not isinstance(module, nn.Linear | BaseTunerLayer)
        if name and candidate and module is not head and not inside_tuner(model, name):
            opaque = opaque_base.find(module)
            if opaque is not None and opaque.backend is not None:
                found.add(name)
    return found


def refuse_shared_embeddings(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raise a ValueError for a target that shares its weight with an embedding, unless both are embeddings and targets.

    The embedding would not get the adapter (T5's stacks have embeddings of their own), but change when it is merged.
    """
    bases, inputs = {name: base_of(module) for name, module in targets.items()}, None
    with suppress(NotImplementedError):  # transformers' audio models have none
        inputs = base_of(getattr(model, "get_input_embeddings", lambda: None)())  # of any class
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is inputs}
    for target, base in bases.items():
        for name, other in embeddings.items():
            weight = getattr(other, "weight", None)
            if other is base or weight is None or weight is not getattr(base, "weight", None):
                continue
            if not isinstance(base, nn.Embedding) or all(other is not one for one in bases.values()):
                raise ValueError(
                    f"target {target!r} shares its weight with the embedding {name!r}, which would not get the "
                    "adapter: leave it out of target_modules, name both embeddings, or load the model with "
                    "tie_word_embeddings=False"
                )


def base_of(module: nn.Module | None) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def inside_tuner(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), BaseTunerLayer) for i in range(1, len(parts)))


def check_supported(name: str, module: nn.Module) -> None:
    """Raise a TypeError or ValueError for a target that cannot be adapted; the message lists the types that can."""
    base = base_of(module)
    if is_quantized(base):
        try:
            of_module(base)
        except (TypeError, ValueError) as error:
            raise type(error)(f"target {name!r}: {error}") from None
        return
    if isinstance(base, LINEARS_NOT_CALLED):
        raise TypeError(
            f"{name!r} belongs to an nn.MultiheadAttention, which never calls it: exclude it, or adapt the attention"
        )
    if isinstance(base, OpenParameters):
        raise ValueError(f"{name!r} is named by target_modules, and a parameter of it by target_parameters: choose one")
    if unfoldings(base) or opaque_base.find(base) is not None:
        return
    if isinstance(base, KINDS_WITH_WEIGHT):
        raise TypeError(
            f"target {name!r} is a {type(base).__name__} whose weight is computed in every forward (weight_norm, "
            "spectral_norm, max_norm): remove that (parametrize.remove_parametrizations), or name it in exclude_modules"
        )
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Linear | Conv1D) and weight is not None:
        if hasattr(weight, "device_mesh"):
            raise TypeError(f"target {name!r} has a sharded weight (FSDP2): add adapters before fully_shard")
        if not has_dense_weight(base):
            raise TypeError(
                f"target {name!r} is a {type(base).__name__} with a {weight.dtype} weight {list(weight.shape)}: "
                "expected fp32, bf16 or fp16, or a layer that bitsandbytes or lorasb.quantize quantized"
            )
        if has_own_result(base):
            raise TypeError(
                f"target {name!r} is a {type(base).__name__}, an nn.Linear whose forward gives something else than "
                f"x Wᵀ: name it in exclude_modules, or adapt its weight: target_parameters=['{name}.weight']"
            )
        return
    raise TypeError(
        f"target {name!r} is a {type(base).__name__}: expected nn.Linear, transformers' Conv1D, nn.Embedding, "
        "nn.Conv1d to 3d, nn.MultiheadAttention with one width, or a module with in_features, out_features and a "
        "linear forward. Narrow target_modules, or name it in exclude_modules"
    )


def check_opaque(targets: dict[str, nn.Module], default_dtype: torch.dtype | None, trained: bool) -> None:
    """Probe one opaque base of each class and kind of storage; raise a TypeError if it is not linear."""
    probed = set()
    for name, module in targets.items():
        base = base_of(module)
        opaque = opaque_base.find(base, default_dtype)
        kind = type(base), type(getattr(base, "weight", None))
        if opaque is not None and kind not in probed and has_weight_values(base):
            check_linear(name, opaque, trained)
            probed.add(kind)


def float_dtype(model: nn.Module) -> torch.dtype | None:
    """The model's dtype if it is a floating-point one, else None."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def can_initialize_now(
    model: nn.Module, config: LoRASBConfig, adapter_name: str, layers: dict[str, AdaptedLayer]
) -> bool:
    """True if the init is data-free, W has values, and neither saved weights nor another adapter's A and B follow."""
    if config.init == "update" or config.basis or config.from_file or any_merged(model):
        return False
    # Meta tensors have no values: PEFT's low_cpu_mem_usage makes such adapters, to be loaded afterwards.
    return all(
        has_weight_values(layer.get_base_layer()) and not layer.lorasb_A[adapter_name].is_meta
        for layer in layers.values()
    )


def refuse_duplicates(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError if the model has an adapter of this name."""
    for name in layers_with(model, adapter_name):
        raise ValueError(
            f"{name} has an adapter {adapter_name!r} already: the model is patched. Use "
            "model.add_adapter(another_name, LoRASBConfig(...)) for one more, or model.unload() to start again"
        )


def check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise if a merged weight would not be finite, or if modules share the weight; changes no layer."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedLayer):
            continue
        requested = adapter_names if adapter_names is not None else module.active_adapters
        names = [n for n in requested if n in module.lorasb_R and n not in module.merged_adapters]
        if names:
            shared = owners.get(id(getattr(module.get_base_layer(), "weight", None)), [])
            if len(shared) > 1 and not isinstance(module, LoRASBEmbedding):  # which merges into a copy
                raise ValueError(
                    f"{name}: expected a separate weight to merge into, got one that {' and '.join(shared)} share, "
                    "which would all get the update: leave the adapter unmerged, or untie the weights before patching"
                )
            try:
                with weight_present(module.get_base_layer()):
                    module.merged_weight(names)  # one layer's W at a time; dropped at once
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


# Heads of task models without a base model attribute, whose layers are attributes of the task model itself.
HEADS_WITHOUT_BASE = (*HEADS, "fc", "head", "projector")
TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|XVector|Segmentation|DepthEstimation)")
POOLERS = ("pooler",)  # part of a base model, but missing from checkpoints that were pretrained without one
# Perceiver's task models pass these to the base model's constructor, so they are inside it and still task-specific.
TASK_MODULES_IN_BASE = ("perceiver.decoder", "perceiver.input_preprocessor")


def save_heads(model: nn.Module, config: LoRASBConfig) -> None:
    """Add modules that the base's checkpoint lacks to modules_to_save: their weights differ after every load."""
    heads = [name for name, _ in model.named_children() if name in HEADS]
    # A loaded config, or one with a fingerprint, already has modules_to_save, which must match its file exactly.
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
    if not any(isinstance(submodule, nn.Linear | nn.Conv1d | nn.Conv2d) for submodule in module.modules()):
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
