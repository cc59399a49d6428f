"""A plain LoRA as a GGUF file for llama.cpp: `llama-cli -m base.gguf --lora adapter.gguf`.

llama.cpp names tensors its own way and turns the rows of q and k of Llama's layout, for rotary embeddings of
neighboring pairs: B's rows turn with them, A's columns stay.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..utils.atomic_files import replacing

# transformers' model types, what llama.cpp calls their architecture, and whether it turns the rows of q and k
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
    """Write lora_A [r, in] and lora_B [out, r] of every layer into one GGUF file.

    Args:
        tensors: an exported adapter's, under PEFT's names.
        alpha: lora_alpha; with alpha = r the file's scale is 1.
        config: the base model's configuration.
        path: of the file.

    Raises:
        ImportError: the `gguf` package is not installed.
        ValueError: an architecture or a layer that llama.cpp has no name for, or modules that were trained whole.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("writing GGUF needs the gguf package: pip install 'lorasb[gguf]'") from None
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"no GGUF adapter for model type {kind!r}: expected one of {', '.join(sorted(ARCHITECTURES))}")
    architecture, turned = ARCHITECTURES[kind]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for key, tensor in sorted(tensors.items()):
            match = FACTOR.match(key)
            if match is None:
                raise ValueError(
                    f"{key} is no factor of a linear layer: GGUF adapters hold those alone, merge the model"
                )
            layer, factor = match.groups()
            found = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
            if found is None:
                raise ValueError(f"llama.cpp has no tensor for layer {layer!r} of a {architecture} model")
            if factor == "lora_B" and turned:
                tensor = _turned(layer, tensor, config)
            writer.add_tensor(f"{found}.{factor.lower()}", tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _turned(layer: str, b: Tensor, config: Any) -> Tensor:
    """B [out, r] of q and k with each head's two halves interleaved; of other layers as it is."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }.get(layer.rpartition(".")[2])
    if heads is None:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def base_config(model: Any, name: str | None) -> Any:
    """The base's configuration, from the model or from the folder that the adapter says it is in.

    Raises:
        ValueError: neither has one.
    """
    own = getattr(model, "config", None) if isinstance(model, torch.nn.Module) else None
    if own is not None and not isinstance(own, dict):
        return own
    file = Path(name or "") / "config.json"
    if not name or not file.is_file():
        raise ValueError(
            f"a GGUF adapter needs its base's configuration, and there is none in {name or 'no folder'!r}: export from "
            "the patched model"
        )
    return SimpleNamespace(**json.loads(file.read_text(encoding="utf-8")))
