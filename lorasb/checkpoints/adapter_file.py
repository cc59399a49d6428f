"""Validate adapter files, read one without a model, and fingerprint the base model that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..constants import CONFIG_NAME, FACTORS, PEFT_NAME, PEFT_PREFIX, WEIGHTS_NAME
from ..utils import reading
from ..utils.precision import FLOATS, WIDE
from ..utils.reading import AGAIN, Json, read_json
from .shared_factors import DIGEST, is_factor, join_factors, missing_factors_error, referenced_digest
from .shared_factors import digest as factors_digest

GLUE_ALPHA = 16.0  # LoRA-XS fixes alpha at 16 on GLUE and at r elsewhere (paper, appendix I)
Shapes = dict[str, tuple[int, ...]]


def check_tensors(tensors: dict[str, Tensor], layers: dict[str, Shapes]) -> None:
    """Raise a ValueError unless a state dict has exactly the factors of `layers` (layer name -> factor -> shape)."""
    factors = group_by_layer(tensors)
    # PEFT loads what matches and reports the rest in a warning: without these checks, a model would run with zeros.
    if not factors and any(".lora_A" in key for key in tensors):
        raise ValueError(
            "this file holds a plain LoRA but its configuration says LORASB: it has no R. Load it with peft_type LORA"
        )
    check_factors(factors, layers)
    extra = sorted(set(factors) - set(layers))
    if extra:
        raise ValueError(f"the adapter file has layers that this model does not adapt: {', '.join(extra[:3])}, ...")


def check_factors(factors: dict[str, dict[str, Tensor]], layers: dict[str, Shapes]) -> None:
    """Raise a ValueError unless every factor of `layers` is there, with its shape and finite values."""
    for name, shapes in layers.items():
        for factor, shape in shapes.items():
            tensor, place = factors.get(name, {}).get(factor), f"{factor} of layer {name!r}"
            if tensor is None:
                raise ValueError(
                    f"the adapter file has no {factor} for layer {name!r}: it belongs to another model or was cut "
                    f"short. It holds {len(factors)} layers, this model has {len(layers)}"
                )
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{place} is {list(tensor.shape)} in the adapter file, expected {list(shape)}: "
                    "the file belongs to another base model, or its adapter_config.json was changed"
                )
            allowed = WIDE if factor == "lorasb_R" else FLOATS  # a 16-bit R has lost the precision of training
            if tensor.dtype not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{place} is {tensor.dtype} in the adapter file, expected one of {names}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{place} has NaN or Inf values in the adapter file: its training had failed")


def group_by_layer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Map layer name -> {"lorasb_A": ..., "lorasb_R": ..., "lorasb_B": ...}; other entries are left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for factor in FACTORS:
            # an adapter name may follow the factor's
            name, separator, _ = key.removeprefix(PEFT_PREFIX).rpartition(f".{factor}")
            if separator:
                if factor in layers.setdefault(name, {}):
                    raise ValueError(f"expected one {factor} for layer {name!r}, got a second one as {key!r}: {AGAIN}")
                layers[name][factor] = value
    return layers


def refuse_other_keys(tensors: Iterable[str], expected: Collection[str]) -> None:
    """Raise a ValueError for a key of an adapter file that is not among the `expected` ones."""
    # PEFT loads every key that names a parameter, including the base's own, and silently ignores the rest.
    others = sorted(set(tensors) - set(expected))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"the adapter file has {others[0]!r}{more}, expected factors of adapted layers and what modules_to_save, "
            f"trainable_token_indices and bias of its configuration name: {AGAIN}"
        )


def check_saved(name: str, tensor: Tensor | None, parameter: Tensor | None) -> None:
    """Raise a ValueError if a fully trained module's tensor does not have the parameter's shape, or is not finite."""
    if tensor is None or parameter is None:
        return
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # a shard of ZeRO-3 is empty
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {list(tensor.shape)} in the adapter file, expected {list(shape)}: load the base model with as "
            "many labels or tokens as it was trained with"
        )
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or Inf values in the adapter file: its training had failed")


def _shapes(factors: dict[str, Tensor]) -> Shapes:
    a, core, b = (factors[part].shape or (0,) for part in FACTORS)  # a scalar fits nothing
    return {"lorasb_A": (core[0], a[-1]), "lorasb_R": (core[0], core[0]), "lorasb_B": (b[0], core[0])}


def read_config(path: str | os.PathLike[str]) -> Json:
    """The adapter_config.json of a LoRA-SB adapter; a ValueError if it is missing or another method's."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        inside = next((f" (did you mean {one.parent}?)" for one in sorted(Path(path).glob(f"*/{CONFIG_NAME}"))), "")
        raise ValueError(f"expected an adapter folder with {CONFIG_NAME}, found none in {path}{inside}")
    config = read_json(file)
    if config.get("peft_type") != PEFT_NAME:
        raise ValueError(f"{path} holds an adapter of type {config.get('peft_type')!r}, expected {PEFT_NAME!r}")
    return config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an adapter folder; a ValueError if they are missing, truncated or incomplete."""
    file = Path(path) / WEIGHTS_NAME
    tensors = join_factors(reading.read_tensors(file), Path(path))
    if DIGEST in tensors:
        raise missing_factors_error(path)
    layers, expected = group_by_layer(tensors), ", ".join(FACTORS)
    for name, factors in layers.items():
        if set(factors) != set(FACTORS):
            raise ValueError(f"layer {name!r} has {', '.join(sorted(factors))} in {file}, expected {expected}")
        try:
            check_factors({name: factors}, {name: _shapes(factors)})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    if not layers:
        raise ValueError(f"{file} holds no LoRA-SB factors ({expected})")
    return tensors


def scaling_of(config: Json, r: int) -> float:
    """The scaling s of a layer of rank `r` according to an adapter's configuration."""
    scaling = float(config.get("scaling", 1.0))
    if not str(config.get("init", "")).startswith("lora-xs"):
        return scaling
    # task_type is a TaskType member or a plain string; str() of the member is "TaskType.SEQ_CLS"
    classification = str(config.get("task_type") or "").rpartition(".")[2] in ("SEQ_CLS", "TOKEN_CLS")
    alpha = config.get("lora_alpha")
    return scaling * (float(alpha) if alpha is not None else GLUE_ALPHA if classification else float(r)) / r


def read_cores(
    folder: Path, config: Json, digests: Collection[bytes], scalings: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """R by layer of an adapter on the basis with these `digests`, times the s of its `config` over that of `scalings`.

    If `scalings` is given, only its layers are returned. Raises a ValueError for a file that does not fit the basis.
    """
    # not mapped: half the time (SmolLM2 at r = 64, Zen 3)
    tensors = reading.read_tensors(folder / WEIGHTS_NAME, mapped=False)
    factors = {key: value for key, value in tensors.items() if is_factor(key)}
    if (referenced_digest(tensors) or factors_digest(factors)) not in digests:
        advice = "load the base model in the dtype that it was trained in, and then the basis"
        raise ValueError(f"{folder} has other A and B than the basis, or the same in another dtype: {advice}")
    others = [key for key in tensors if key != DIGEST and not any(f".{part}" in key for part in FACTORS)]
    if others:
        raise ValueError(
            f"{folder} has more than R ({others[0]}, ...): modules, biases or token rows that were trained in full "
            "cannot be added to a basis. Load it as an adapter of the model"
        )
    found = {}
    for name, parts in group_by_layer(tensors).items():
        core = parts.get("lorasb_R")
        if core is not None and core.dim() and (scalings is None or name in scalings):
            ratio = scaling_of(config, len(core)) / (scalings[name] if scalings else 1.0)
            found[name] = core if ratio == 1.0 else core * ratio
    return found


VALUES = 16  # per sampled layer
TOLERANCE = 2.0**-8  # relative; rounding to bf16 changes a weight by at most 2^-9 of it
SMALLEST = 2.0**-24  # absolute; the spacing of fp16 numbers near zero


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Sixteen values of the first, middle and last weight, by layer name; None if one of them cannot be read."""
    names = list(weights)
    chosen = {names[i]: weights[names[i]] for i in (0, len(names) // 2, len(names) - 1)} if names else {}
    if not chosen or not all(_readable(weight) for weight in chosen.values()):
        return None
    return {name: " ".join(f"{value:.7g}" for value in _sample(weight)) for name, weight in chosen.items()}


def difference(weights: Mapping[str, Tensor | None], expected: Mapping[str, str]) -> str | None:
    """Return how these weights differ from a fingerprint beyond rounding to bf16; None if they do not."""
    for name, text in expected.items():
        if name.endswith(".base_layer"):  # of attention, in files up to 0.3: an unadapted base has no such layer
            continue
        if name not in weights:
            return f"it has no adapted layer {name!r}"
        values, weight = [float(value) for value in text.split()], weights[name]
        if weight is None or not _readable(weight):  # counts as equal
            continue
        pairs = zip(_sample(weight), values, strict=True)
        num_different = sum(abs(a - b) > TOLERANCE * abs(b) + SMALLEST for a, b in pairs)
        if num_different:
            return f"{num_different} of {len(values)} sampled weights of {name!r} differ"
    return None


def _readable(weight: Tensor) -> bool:
    """True for a plain dense tensor with values: not quantized, sharded, offloaded or empty (ZeRO-3)."""
    if hasattr(weight, "quant_state") or weight.element_size() == 1:  # fp8 scales are stored elsewhere
        return False
    return not weight.is_meta and type(weight.data) is Tensor and weight.is_floating_point() and weight.numel() > 0


@torch.no_grad()
def _sample(weight: Tensor) -> list[float]:
    """Evenly spaced values of the flattened weight, its first and last included."""
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
    values: list[float] = flat[index].tolist()
    return values
