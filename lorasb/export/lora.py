"""Exact export to plain LoRA, as files or, step by step, as tensors: A is unchanged, B becomes s·B·R.

Stock PEFT, vLLM and llama.cpp read it without lorasb.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from ..checkpoints import adapter_file
from ..checkpoints.shared_factors import DIGEST
from ..compat.torch import unwrapped
from ..compat.transformers import name_or_path
from ..config.adapter import LoRASBConfig
from ..constants import CONFIG_NAME, FACTORS, PEFT_NAME, PEFT_PREFIX, WEIGHTS_NAME
from ..layers.lookup import frozen_factors, layer_kinds, layers_of_one, refuse_more_than_factors
from ..layers.unfused_experts import NAMES, parameter_of
from ..layers.weight_adapter import ATTENTION, CONVOLUTION, EMBEDDING, SLICE
from ..utils.atomic_files import replacing
from ..utils.reading import Json, read_json, read_text

# The values that vLLM accepts for --max-lora-rank; its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FORMATS = ("peft", "vllm", "gguf")
EXPORTED = "Exported by lorasb"  # marks our cards
Pair = tuple[Tensor, Tensor]  # A and B
BIASES = {"all": "all", "lorasb_only": "lora_only", "lora_only": "lora_only"}  # our values of `bias` -> PEFT's
COPIED_FIELDS = (
    *("base_model_name_or_path", "revision", "task_type", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "auto_mapping"),
    *("trainable_token_indices", "ensure_weight_tying"),
)


def export_lora(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    format: str = "peft",
    quiet: bool = False,
) -> Path:
    """Write an adapter as a plain LoRA: `lora_A = A`, `lora_B = s·B·R`, zero-padded to a common rank r = lora_alpha.

    Args:
        model: a patched model, or the folder of a saved adapter.
        path: the folder to write: adapter_config.json, adapter_model.safetensors, README.md; or adapter.gguf.
        adapter_name: which adapter of the model; the active one by default.
        dtype: dtype of the written tensors; fp32 keeps R's precision.
        format: "peft" for PEFT, and for vLLM if no experts are adapted; "vllm" with a linear for each expert, at a
            rank that vLLM accepts; or "gguf" for llama.cpp, in fp32 (`lorasb.export.lora.ARCHITECTURES`).
        quiet: do not print the serving command.

    Returns:
        The folder, or the GGUF file.

    Raises:
        ValueError: no initialized adapter, several active ones and no `adapter_name`, values not finite in `dtype`, an
            unknown format or model type, or an adapter or README in `path` that is not an export's.
        ImportError: gguf is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    folder = Path(path)
    if format != "gguf":
        _refuse_adapters_folder(folder)
    model = unwrapped(model)
    config, tensors, scalings = _read(model, adapter_name) if isinstance(model, nn.Module) else _read_folder(model)
    layers = adapter_file.group_by_layer(tensors)
    # One rank for all layers: vLLM ignores rank_pattern, and llama.cpp scales by lora_alpha / rank of each tensor.
    rank = max(factors["lorasb_R"].shape[0] for factors in layers.values())
    rank = _vllm_rank(rank) if format == "vllm" else rank
    lora_factors = {name: _lora_factors(name, factors, scalings[name], rank, dtype) for name, factors in layers.items()}
    base = None if format == "peft" else base_config(model, config.get("base_model_name_or_path"))
    if format == "vllm":
        named = per_expert(lora_factors, getattr(base, "model_type", None))
        target_modules = sorted({name.rpartition(".")[2] for name in named})  # vLLM checks the last parts of names
        config |= {"target_modules": target_modules, "target_parameters": None}
    else:
        named = fuse_experts(lora_factors)
    # Modules that were trained in full are copied.
    written = {key: value for key, value in tensors.items() if not any(f".{p}" in key for p in FACTORS)}
    written |= in_pefts_layout(named, config.get("layer_kinds") or {})
    if format == "gguf":
        found = write_gguf(written, rank, base, folder / "adapter.gguf")
        usage = f"Run it with:\n  llama-cli -m BASE_MODEL.gguf --lora {shlex.quote(str(found))}"
    else:
        found, usage = folder, f"Serve it with:\n  {_write_peft(config, written, rank, folder)}"
    if not quiet:
        print(f"plain LoRA of rank {rank} in {found}. {usage}")
    return found


def _refuse_adapters_folder(folder: Path) -> None:
    """Raise a ValueError if the plain LoRA would replace a LoRA-SB adapter, losing its R, or files of no export."""
    try:
        kind = read_json(folder / CONFIG_NAME).get("peft_type")
    except (OSError, ValueError):
        kind = None
    if kind == PEFT_NAME:
        raise ValueError(f"{folder} has a LoRA-SB adapter, which the plain LoRA would replace: name another folder")
    card = folder / "README.md"
    if card.is_file() and EXPORTED in read_text(card):
        return
    if other := next((file for file in (card, folder / CONFIG_NAME, folder / WEIGHTS_NAME) if file.exists()), None):
        raise ValueError(f"{other} is not an export's, and would be replaced: name another folder")


def _write_peft(config: Json, tensors: dict[str, Tensor], rank: int, folder: Path) -> str:
    """Write a plain LoRA and return the command that serves it."""
    # safetensors refuses tensors that are not contiguous, as padded and stacked ones may be, and tied ones
    pointers = Counter(value.data_ptr() for value in tensors.values())
    separate = {k: v.clone() if pointers[v.data_ptr()] > 1 else v.contiguous() for k, v in tensors.items()}
    name = config.get("base_model_name_or_path")
    base = name or "unknown"
    front = yaml.safe_dump({"library_name": "peft", "base_model": base, "tags": ["lora"]}, sort_keys=False)
    card = (
        f"---\n{front}---\n\n# A plain LoRA of rank {rank}\n\n"
        f"{EXPORTED} from a LoRA-SB adapter of `{base}`: `lora_A = A`, `lora_B = s·B·R`, the same function.\n\n"
        f"```\n{serve_command(name, Path('THIS_FOLDER'), rank)}\n```\n"
    )
    names = WEIGHTS_NAME, CONFIG_NAME, "README.md"
    with ExitStack() as stack:  # all are written before any takes the place of an earlier export's
        weights, values, text = (stack.enter_context(replacing(folder / name)) for name in names)
        save_file(separate, str(weights), metadata={"format": "pt"})
        values.write_text(json.dumps(_lora_config(config, rank), indent=2) + "\n", encoding="utf-8")
        text.write_text(card, encoding="utf-8")
    return serve_command(name, folder, rank)


def _vllm_rank(rank: int) -> int:
    return next((choice for choice in VLLM_RANKS if choice >= rank), rank)  # our ranks end at MAX_RANK, 256


def serve_command(base: str | None, folder: Path, rank: int) -> str:
    """The vLLM command for an exported adapter, with the smallest `--max-lora-rank` that vLLM accepts."""
    options = f"--enable-lora --max-lora-rank {_vllm_rank(rank)} --lora-modules {shlex.quote(f'adapter={folder}')}"
    return f"vllm serve {shlex.quote(base or 'BASE_MODEL')} {options}"


def _read(model: nn.Module, adapter_name: str | None) -> tuple[Json, dict[str, Tensor], dict[str, float]]:
    name, layers = layers_of_one(model, adapter_name)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if DIGEST in tensors:  # an adapter on another one's A and B
        del tensors[DIGEST]
        tensors |= {f"{PEFT_PREFIX}{key}": value for key, value in frozen_factors(layers, name).items()}
    config = cast(PeftModel, model).peft_config[name].to_dict()
    config["base_model_name_or_path"] = config["base_model_name_or_path"] or name_or_path(model)
    config["fan_in_fan_out"] = any(layer.base.fan_in_fan_out for layer in layers.values())
    return config, tensors, {n: m.adapters[name].scaling for n, m in layers.items()}


def _read_folder(path: str | os.PathLike[str]) -> tuple[Json, dict[str, Tensor], dict[str, float]]:
    values, tensors = adapter_file.read_config(path), adapter_file.read_tensors(path)
    config = LoRASBConfig.from_pretrained(str(path))
    layers = adapter_file.group_by_layer(tensors)
    fresh = next((name for name, factors in layers.items() if not factors["lorasb_A"].any()), None)
    if fresh is not None:
        raise ValueError(f"the adapter in {path} was saved before it was initialized ({fresh}): nothing was written")
    return values, tensors, {n: config.scaling_for(factors["lorasb_R"].shape[0]) for n, factors in layers.items()}


def _lora_factors(name: str, factors: dict[str, Tensor], scaling: float, rank: int, dtype: torch.dtype) -> Pair:
    """A [rank, in] and s·B·R [out, rank], zero-padded; the product is computed in fp64 and rounded once."""
    core = factors["lorasb_R"].double() * scaling
    padding = rank - core.shape[0]
    a = nn.functional.pad(factors["lorasb_A"].to(dtype), (0, 0, 0, padding))
    b = nn.functional.pad((factors["lorasb_B"].double() @ core).to(dtype), (0, padding))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):  # fp16 overflows above 65504
        raise ValueError(f"layer {name!r} has values that are not finite in {dtype}: nothing was written")
    return a, b


def fuse_experts(factors: dict[str, Pair]) -> dict[str, Pair]:
    """Factors of experts in PEFT's layout: A [E·r, in], expert by expert, and B [out, r·E], experts fastest-varying."""
    joined = {name: pair for name, pair in factors.items() if parameter_of(name) is None}
    groups: dict[str, list[str]] = {}
    for name in factors:
        groups.setdefault(parameter_of(name) or "", []).append(name)
    # "...experts.gate_up_proj.3" is expert 3 of the parameter gate_up_proj of the module experts. PEFT wraps a module
    # once per parameter: the last one's factors have the module's name, an earlier one's are under `base_layer`.
    for module in {group.rpartition(".")[0] for group in groups if group}:
        name_in_peft = module
        for parameter in [f"{module}.{name}" for name in reversed(NAMES) if f"{module}.{name}" in groups]:
            members = sorted(groups[parameter], key=lambda name: int(name.rpartition(".")[2]))
            a = torch.cat([factors[name][0] for name in members])
            joined[name_in_peft] = a, torch.stack([factors[name][1] for name in members], -1).flatten(1)
            name_in_peft += ".base_layer"
    return joined


def _lora_config(config: Json, rank: int) -> Json:
    values = {key: config.get(key) for key in COPIED_FIELDS}
    return {
        **{key: sorted(value) if isinstance(value, set) else value for key, value in values.items()},
        "fan_in_fan_out": config.get("fan_in_fan_out", False),
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # PEFT's scaling alpha / r is then 1: s is in lora_B
        "lora_dropout": 0.0,
        "bias": BIASES.get(config.get("bias", "none"), "none"),
        "inference_mode": True,
        "init_lora_weights": True,
    }


# Names of gate, up and down, and of the block's module, by config.model_type; some checkpoints have unusual ones.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OF_MIXTRAL = (("w1", "w3", "w2"), ".mlp.experts", ".block_sparse_moe.experts")
OTHER_NAMES = dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2"), OF_MIXTRAL)
OTHER_NAMES["lfm2_moe"] = (("w1", "w3", "w2"), "", "")


def in_pefts_layout(factors: Mapping[str, Pair], kinds: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """State dict entries of layers' lora_A [r, in] and lora_B [out, r], according to the config's `layer_kinds`."""
    for name, kind in kinds.items():
        if kind[0] == SLICE:
            raise ValueError(f"no plain LoRA has the layout of {name!r}: merge the adapter (model.merge_and_unload())")
    entries: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        what, _, groups, *shape = kinds.get(name, (None, "weight", 1))
        start = f"{PEFT_PREFIX}{name}"
        if what == EMBEDDING:
            entries |= {f"{start}.lora_embedding_A": a, f"{start}.lora_embedding_B": b}
            continue
        # Measured with PEFT 0.21.2: its plain LoRA of nn.MultiheadAttention adds out_proj's update twice.
        if what == ATTENTION or groups != 1:
            reason = "nn.MultiheadAttention, whose output projection PEFT's LoRA updates twice"
            if what == CONVOLUTION:
                reason = "a convolution in groups, dilated or padded by others than zeros, which no plain LoRA has"
            raise ValueError(f"{name!r} is {reason}: merge it (model.merge_and_unload()), or use exclude_modules")
        if what == CONVOLUTION:
            a, b = a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *[1] * len(shape[2:]))
        entries |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    return entries


# vLLM expands its module `experts` to one entry per expert and projection, `experts.{e}.{name}`, with the checkpoint's
# names (`process_packed_modules_mapping`, vllm/lora/utils.py); it does not read PEFT's layout of `target_parameters`.
def per_expert(factors: dict[str, Pair], model_type: str | None) -> dict[str, Pair]:
    """Every layer's lora_A [r, in] and lora_B [out, r] under vLLM's names."""
    named: dict[str, Pair] = {}
    (gate, up, down), mine, theirs = OTHER_NAMES.get(model_type or "", (PROJECTIONS, "", ""))
    for name, (a, b) in factors.items():
        parameter = parameter_of(name)
        if parameter is None:
            named[name] = a, b
            continue
        experts, _, projection = parameter.rpartition(".")
        expert = f"{experts.replace(mine, theirs) if mine else experts}.{name.rpartition('.')[2]}"
        if projection == NAMES[1]:
            named[f"{expert}.{down}"] = a, b
        else:
            # each has a copy of A, as safetensors refuses shared memory, and its half of B
            named[f"{expert}.{gate}"], named[f"{expert}.{up}"] = ((a.clone(), half) for half in b.chunk(2))
    return named


# transformers' model type -> (llama.cpp's architecture, True if it permutes the rows of q and k, as its rotary
# embedding rotates neighboring pairs where transformers' rotates the two halves of a head)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
GGUF_KEY = re.compile(r"^base_model\.model\.(.+)\.(lora_[AB])\.weight$")


def write_gguf(tensors: dict[str, Tensor], alpha: float, config: Any, path: Path) -> Path:
    """Write an exported adapter's lora_A [r, in] and lora_B [out, r] into a GGUF file; alpha is its lora_alpha."""
    try:
        import gguf
    except ImportError:
        raise ImportError("writing GGUF needs the gguf package: pip install 'lorasb[gguf]'") from None
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"no GGUF adapter for model type {kind!r}: expected one of {', '.join(sorted(ARCHITECTURES))}")
    architecture, permuted = ARCHITECTURES[kind]
    # the gguf package maps its enum to names; this inverts it
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    written: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        match = GGUF_KEY.match(key)
        if match is None:
            raise ValueError(f"GGUF adapters have only factors of linear layers, got {key}: merge the model")
        layer, factor = match.groups()
        # llama.cpp reads lora_a and lora_b under the base tensor's name
        tensor_name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if tensor_name is None:
            raise ValueError(f"llama.cpp has no tensor for layer {layer!r} of a {architecture} model")
        turned = factor == "lora_B" and permuted
        written[f"{tensor_name}.{factor.lower()}"] = _permute_rows(layer, tensor, config) if turned else tensor
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, tensor in written.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:  # tensors are written through a buffer, whose last errors are lost
            gguf.GGUFReader(str(temporary))
        except ValueError as error:
            raise OSError("it is truncated, so the disk may be full") from error
    return path


def _permute_rows(layer: str, b: Tensor, config: Any) -> Tensor:
    """B [out, r] of q and k with the two halves of each head interleaved; B of other layers unchanged."""
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    heads = {"q_proj": queries, "k_proj": keys}.get(layer.rpartition(".")[2])
    if heads is None:
        return b
    # [heads, 2, half, r] -> [heads, half, 2, r]: row i of the first half is followed by row i of the second
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def base_config(model: object, name: str | None) -> Any:
    """The base's configuration, from the model or its folder; a ValueError if neither has one."""
    model_config = getattr(model, "config", None) if isinstance(model, nn.Module) else None
    if model_config is not None and not isinstance(model_config, dict):
        return model_config
    try:
        return AutoConfig.from_pretrained(name or "")  # of a folder, or of the Hub
    except (OSError, ValueError, TypeError, AttributeError):
        raise ValueError(
            f"this format needs its base's configuration, got none from {name or 'no folder'!r}: export from "
            "the patched model"
        ) from None


PARTS = ("lora", "basis", "core")  # of `adapter_delta`


@torch.no_grad()
def adapter_delta(
    model: nn.Module, part: str = "lora", *, adapter_name: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors for a process that serves the same base: no weight is merged, no base weight is sent.

    A trainer sends `adapter_delta(model, "basis")` once, and "core" after every step: 4·r² bytes per layer, 3.7 MB for
    the 224 linears of a 7B Llama at r = 64. The other side makes the plain LoRA from both with `lora_of`.

    Args:
        model: a patched model.
        part: "lora" (lora_A = A, lora_B = s·B·R, by PEFT's names), "basis" (A [r, in] and s·B [out, r]) or "core" (R).
        adapter_name: which adapter; the active one by default.
        dtype: dtype of the tensors; the factors' by default, but fp32 for "lora", and for B if s != 1.

    Returns:
        Tensors by name, on the model's device; those of "basis" and "core" are the adapter's own where no dtype or
        scale changes them: copy them to keep them beyond the next step.

    Raises:
        ValueError: an unknown part, several active adapters, or one that is not initialized or has more than factors
            (trained modules, token rows or biases).
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    model = unwrapped(model)
    name, layers = layers_of_one(model, adapter_name)
    refuse_more_than_factors(model, name, "export_lora writes all of it")
    if part == "core":
        return {path: layer.lorasb_R[name].detach().to(dtype=dtype) for path, layer in layers.items()}
    basis: dict[str, Tensor] = {}
    for path, layer in layers.items():
        a, b, s = layer.lorasb_A[name].detach(), layer.lorasb_B[name].detach(), layer.adapters[name].scaling
        basis[f"{path}.A"] = a.to(dtype=dtype)
        basis[f"{path}.B"] = (b if s == 1.0 else b.float() * s).to(dtype=dtype)
    if part == "basis":
        return basis
    core = {path: layer.lorasb_R[name].detach() for path, layer in layers.items()}
    return lora_of(basis, core, kinds=layer_kinds(layers), dtype=dtype or torch.float32)


@torch.no_grad()
def lora_of(
    basis: Mapping[str, Tensor],
    core: Mapping[str, Tensor],
    *,
    kinds: Mapping[str, Sequence[Any]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The plain LoRA of a basis and R's, as `adapter_delta(model)` returns it on the trainer's side: lora_alpha = r.

    Args:
        basis: result of `adapter_delta(model, "basis")`.
        core: result of `adapter_delta(model, "core")`.
        kinds: `layer_kinds` of the adapter's config, if it has embeddings or convolutions.
        dtype: dtype of the result; products are fp32.

    Raises:
        ValueError: the two do not have the same layers.
    """
    odd = sorted({key.removesuffix(".A") for key in basis if key.endswith(".A")} ^ set(core))
    if odd:
        raise ValueError(
            f"expected R of every layer of the basis, and no other: {', '.join(odd[:3])} is on one side only"
        )
    pairs = {n: (basis[f"{n}.A"].float(), basis[f"{n}.B"].float() @ r.float()) for n, r in core.items()}
    fused = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in fuse_experts(pairs).items()}
    return in_pefts_layout(fused, kinds or {})
