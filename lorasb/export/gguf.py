"""A plain LoRA as a GGUF file for llama.cpp: `llama-cli -m base.gguf --lora adapter.gguf`."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..utils.atomic_files import replacing
from ..utils.reading import read_json

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
FACTOR = re.compile(r"^base_model\.model\.(.+)\.(lora_[AB])\.weight$")


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
    # the gguf package maps its enum to names; this is the way back
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        # An error below leaves no file: `replacing` renames the temporary file only at the end of the block.
        for key, tensor in sorted(tensors.items()):
            match = FACTOR.match(key)
            if match is None:
                raise ValueError(f"{key} is no factor of a linear layer, as GGUF adapters need: merge the model")
            layer, factor = match.groups()
            # llama.cpp reads lora_a and lora_b under the base tensor's name
            tensor_name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            if tensor_name is None:
                raise ValueError(f"llama.cpp has no tensor for layer {layer!r} of a {architecture} model")
            if factor == "lora_B" and permuted:
                tensor = _permute_rows(layer, tensor, config)
            writer.add_tensor(f"{tensor_name}.{factor.lower()}", tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
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
    model_config = getattr(model, "config", None) if isinstance(model, torch.nn.Module) else None
    if model_config is not None and not isinstance(model_config, dict):
        return model_config
    file = Path(name or "") / "config.json"
    if not name or not file.is_file():
        raise ValueError(
            f"this format needs its base's configuration, and there is none in {name or 'no folder'!r}: export from "
            "the patched model"
        )
    return SimpleNamespace(**read_json(file))
