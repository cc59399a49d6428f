"""Load adapters: join R from a file without A and B with those of its run or basis; swap one adapter for another."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..checkpoints import adapter_file, shared_factors
from ..checkpoints.adapter_file import SMALLEST, TOLERANCE, difference
from ..checkpoints.shared_factors import DIGEST, join_factors
from ..compat.torch import unwrapped
from ..compat.transformers import HAS_ADAPTER, is_loaded
from ..config.adapter import LoRASBConfig
from ..constants import CONFIG_NAME, FACTORS, FACTORS_NAME, PEFT_NAME, PEFT_PREFIX, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import adapted_layers, discard, frozen_factors, layers_with, note_cast, refuse_shared_basis
from ..serving import basis
from ..utils.reading import AGAIN, read_json
from .targets import without_wrapper


def by_peft(
    original: Callable[..., Any], model: peft.PeftModel, model_id: Any, adapter_name: str, *args: Any, **options: Any
) -> Any:
    """Load by PEFT's `load_adapter`, finding A and B next to a file when resuming; an error leaves no new adapter."""
    config = model.peft_config.get(adapter_name)
    source = config.source if isinstance(config, LoRASBConfig) else None
    # `PeftModel.from_pretrained` adds the adapter of a folder's config right before this call; others are the user's
    is_new = config is None or (source is not None and source[0] == str(model_id))
    if isinstance(config, LoRASBConfig):  # PEFT reads no other configuration, which would record the folder
        config.source = str(model_id), options
    try:
        folder = Path(model_id, options.get("subfolder") or "")
        if _lacks_weights(folder):  # PEFT would look for them on the hub
            raise ValueError(f"expected {WEIGHTS_NAME} in {folder}, found none: {AGAIN}")
        return original(model, model_id, adapter_name, *args, **options)
    except BaseException:  # Ctrl-C, too
        if isinstance(config, LoRASBConfig):
            config.source = source
        config = model.peft_config.get(adapter_name)
        layers = layers_with(model, adapter_name).values()
        is_empty = not any(layer.is_initialized(adapter_name) for layer in layers)
        if isinstance(config, LoRASBConfig) and config.from_file and is_new and is_empty:
            discard(model, adapter_name)
        raise


def by_transformers(original: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Any:
    """Load by transformers' `load_adapter`, refuse missing or infinite values; an error leaves no LoRA-SB adapter."""
    before, has_adapter = set(getattr(model, "peft_config", ())), getattr(model, HAS_ADAPTER, None)
    active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, AdaptedLayer)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        result = original(model, *args, **options)
        for name in set(model.peft_config) - before:
            _check_loaded(model, name)
        return result
    except BaseException:  # Ctrl-C, too
        configs: dict[str, object] = getattr(model, "peft_config", {})
        for name in [name for name in set(configs) - before if isinstance(configs[name], LoRASBConfig)]:
            for layer, names in active:
                layer._active_adapter = names
            discard(model, name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        if has_adapter is not None:
            setattr(model, HAS_ADAPTER, has_adapter)
        raise


def _lacks_weights(folder: Path) -> bool:
    """True for the folder of a LoRA-SB adapter without weights, which PEFT would look for on the hub."""
    config = folder / CONFIG_NAME
    if not config.is_file() or any((folder / name).is_file() for name in (WEIGHTS_NAME, "adapter_model.bin")):
        return False
    return bool(read_json(config).get("peft_type") == PEFT_NAME)


def _folder(model_id: str, options: dict[str, Any]) -> Path | None:
    """The folder with the factor file: the adapter's, or the Hub's local cache; None if there is none."""
    folder = Path(model_id, options.get("subfolder") or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    supported = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    try:
        factor_file = hf_hub_download(model_id, FACTORS_NAME, **{k: v for k, v in options.items() if k in supported})
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None  # not an error yet: `with_factors` tries the A and B that the model has
    return Path(factor_file).parent


def with_factors(
    tensors: dict[str, Tensor], adapter_name: str, layers: dict[str, AdaptedLayer], config: LoRASBConfig
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Return a file's tensors with the A and B that its R belongs to, and a function that prepares the adapter.

    A and B come from the model if it has them. The function moves the adapter to the basis that has them, or takes it
    off its current basis. Call it after checking the tensors: until then the model is unchanged.
    """
    expected = shared_factors.referenced_digest(tensors)
    # R is meaningless with other factors, so the digest decides, not the shapes.
    found = None if expected is None else basis.with_digest(layers, expected, first=adapter_name)
    if found is not None:  # the model has them

        def move(owner: str = found) -> None:
            """Give the adapter the A and B that it was trained on, which another adapter owns."""
            if owner != adapter_name:
                for layer in layers.values():
                    layer.share_factors_of(adapter_name, owner)
                config.basis = next(iter(layers.values())).adapters[adapter_name].basis

        # transformers' load_adapter strips PEFT's prefix before this; A and B need the same prefix as R.
        prefix = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in tensors) else ""
        own = {key: value for key, value in tensors.items() if key != DIGEST and not shared_factors.is_factor(key)}
        return own | {f"{prefix}{key}": value for key, value in frozen_factors(layers, found).items()}, move
    if expected is not None and config.source is not None and not any(map(shared_factors.is_factor, tensors)):
        folder = _folder(*config.source)
        tensors = tensors if folder is None else join_factors(tensors, folder)
    tensors = {key: value for key, value in tensors.items() if key != DIGEST}
    if expected is None or any(map(shared_factors.is_factor, tensors)):  # the file or its folder has them

        def leave() -> None:
            """Let the adapter take the file's own A and B."""
            if basis.make_room(layers, adapter_name, tensors) or expected is not None:
                config.basis = None

        return tensors, leave
    if not config.basis:
        raise shared_factors.missing_factors_error()
    raise ValueError(
        f"adapter {adapter_name!r} holds R alone, and was trained on a basis {config.basis!r} that neither this "
        "model nor the adapter's folder has: load the basis first (PeftModel.from_pretrained(base, BASIS)), then "
        "the adapter (model.load_adapter(FOLDER, NAME))"
    )


def without_foreign(
    tensors: dict[str, Tensor], model: nn.Module, config: LoRASBConfig, adapter_name: str, layers: Collection[str]
) -> dict[str, Tensor]:
    """Drop the copies of trained modules and base embeddings that PEFT adds to a file when it saves."""
    wrappers = []
    parameters = {without_wrapper(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    prefix = PEFT_PREFIX if any(name.startswith(PEFT_PREFIX) for name in parameters) else ""
    expected = {f"{prefix}{without_wrapper(layer)}.{factor}" for layer in layers for factor in FACTORS}
    by_name = {without_wrapper(key): value for key, value in tensors.items()}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper, own = f"{without_wrapper(name)}.", module.state_dict(keep_vars=True)
            wrappers.append(wrapper)
            for in_file, key in module.adapter_state_dict_load_map(adapter_name).items():
                expected.add(wrapper + key)
                place = f"{wrapper}{in_file}".removeprefix(PEFT_PREFIX)
                adapter_file.check_saved(place, by_name.get(wrapper + key), own.get(key))
    if config.bias != "none":
        of_layers = tuple(f"{prefix}{without_wrapper(layer)}." for layer in layers)
        biases = (name for name in parameters if name.endswith(".bias"))
        expected.update(name for name in biases if config.bias == "all" or name.startswith(of_layers))
    saved = {}
    for key, value in tensors.items():
        name = without_wrapper(key)
        if name in expected or not (name.startswith(tuple(wrappers)) or _equals_base(parameters.get(name), value)):
            saved[key] = value
    adapter_file.refuse_other_keys(map(without_wrapper, saved), {*expected, DIGEST})
    return saved


def refuse_missing_modules(model: nn.Module, config: LoRASBConfig) -> None:
    """Raise a ValueError if the file lacks a module that its config lists as saved."""
    if config.saved_names is None:
        return
    saved = {name.removeprefix(PEFT_PREFIX) for name in config.saved_names}
    for name in config.modules_to_save or ():
        places = {n: module for n, module in model.named_modules() if n == name or n.endswith(f".{name}")}
        found = {place: module for place, module in places.items() if any(k.startswith(f"{place}.") for k in saved)}
        if places and not found:
            raise ValueError(f"modules_to_save {name!r}: expected its weights in the adapter file, got none: {AGAIN}")
        for place, module in found.items():
            own = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            missing = [key for key in own.state_dict() if f"{place}.{key}" not in saved]
            if missing:
                raise ValueError(f"expected {place}.{missing[0]} in the adapter file, got none: {AGAIN}")
    if config.trainable_token_indices and not any("trainable_tokens" in key for key in saved):
        raise ValueError(f"trainable_token_indices: expected their rows in the adapter file, got none: {AGAIN}")


def _check_loaded(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError if transformers' `load_adapter` left a layer of a LoRA-SB adapter without usable values."""
    layers = {n: one for n, one in layers_with(model, adapter_name).items() if not one.lorasb_A[adapter_name].is_meta}
    if not any(layer.is_initialized(adapter_name) for layer in layers.values()):
        return  # it was saved before it was initialized
    found = {name: {part: getattr(layer, part)[adapter_name] for part in FACTORS} for name, layer in layers.items()}
    loaded = {name: {part: v for part, v in parts.items() if is_loaded(v)} for name, parts in found.items()}
    adapter_file.check_factors(loaded, {name: layer.shapes(adapter_name) for name, layer in layers.items()})


def _equals_base(parameter: Tensor | None, value: Tensor) -> bool:
    """True if a value equals the base parameter up to rounding to 16 bits, or the base is offloaded."""
    if parameter is None or parameter.shape != value.shape:
        return False
    if parameter.is_meta:
        return True
    return torch.allclose(value.to(parameter.device).float(), parameter.float(), rtol=TOLERANCE, atol=SMALLEST)


DESCRIBING = ("scaling", "lora_alpha", "init", "init_provenance", "base_fingerprint", "equivalent_gradient")


@torch.no_grad()
def swap(
    original: Callable[..., None],
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Overwrite a loaded adapter's A, B and R in place with a saved one's; on a ValueError nothing is changed.

    Takes PEFT's `hotswap_adapter`, which swaps adapters of other methods, and that function's arguments.
    """
    path, configs = model_name_or_path, getattr(unwrapped(model), "peft_config", {})
    if not any(isinstance(one, LoRASBConfig) for one in configs.values()):
        original(model, path, adapter_name, torch_device, **options)
        return
    model = unwrapped(model)
    config = LoRASBConfig.from_pretrained(str(path), **options)
    _, layers = adapted_layers(model, adapter_name)
    for layer in layers.values():
        layer.refuse_merged(adapter_name)
    refuse_shared_basis(layers, adapter_name)
    weights = {name: getattr(layer.get_base_layer(), "weight", None) for name, layer in layers.items()}
    reason = difference(weights, config.base_fingerprint) if config.check_base and config.base_fingerprint else None
    if reason:
        raise ValueError(f"{path} was made on another base model: {reason}. Hotswapping needs adapters of one base")
    tensors = peft.load_peft_weights(str(path), device=torch_device, **options)
    tensors, _ = with_factors(tensors, adapter_name, layers, config)
    try:
        adapter_file.check_tensors(tensors, {name: layer.shapes(adapter_name) for name, layer in layers.items()})
    except ValueError as error:
        raise ValueError(f"{path} does not fit the loaded adapter {adapter_name!r}: {error}") from None
    note_cast(layers, adapter_name, {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()})
    others = [key for key in tensors if not any(f".{part}" in key for part in FACTORS)]
    if others:
        raise ValueError(
            f"{path} has more than A, R and B ({others[0]}, ...): load it with model.load_adapter(path, another_name)"
        )
    for name, factors in adapter_file.group_by_layer(tensors).items():
        a, core, b = (factors[part] for part in FACTORS)
        layers[name].set_factors(adapter_name, b, core, a)
        state = layers[name].adapters[adapter_name]
        state.scaling = state.made_with = config.scaling_for(len(core))
        state.equivalent_gradient = config.equivalent_gradient
    for field in DESCRIBING:  # a later save describes the new adapter
        setattr(model.peft_config[adapter_name], field, getattr(config, field))
