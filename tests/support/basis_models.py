"""A tiny Llama with an adapter "default", and other adapters that share its A and B."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import batches_for, llama, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorasb
from lorasb.constants import CONFIG_NAME, WEIGHTS_NAME
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with

NAMES = ("ada", "emmy", "grace")


def base() -> nn.Module:
    """A Llama with the same weights every time."""
    torch.manual_seed(3)
    return llama()


def with_basis(**options: Any) -> Any:
    """A model whose adapter "default" is initialized."""
    return lorasb.patch(base(), **{"r": 4, "init": "kaiming"} | options).eval()


def fill(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter's R random values."""
    g = torch.Generator().manual_seed(seed)
    for layer in layers_with(model, name).values():
        layer.lorasb_R[name].data.normal_(std=0.3, generator=g)


def with_users(*names: str, **options: Any) -> Any:
    """The model of `with_basis`, with more adapters on the basis, each with its own R."""
    model = with_basis(**options)
    for seed, name in enumerate(names):
        model.add_adapter(name, lorasb.LoRASBConfig(basis="default"))
        fill(model, name, seed)
    return model


def moved_to_bank(model: Any, **options: Any) -> lorasb.AdapterBank:
    """Move the model's adapters on the basis into a new bank."""
    model.set_adapter("default")
    bank = lorasb.AdapterBank(model, **options)
    for name in [name for name in model.peft_config if name != "default"]:
        cores = {n: layer.lorasb_R[name].detach() for n, layer in layers_with(model, name).items()}
        model.delete_adapter(name)
        bank.add(name, cores)
    return bank


def cores_of(bank: lorasb.AdapterBank, seed: int = 1) -> dict[str, Tensor]:
    """Random R's for one adapter of a bank."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(c.r, c.r, generator=g) * 0.3 for name, c in bank.columns.items()}


def saved(folder: Path, *names: str) -> Any:
    """Save a model with these adapters and return it: "default" in `folder`, the others in subfolders."""
    model = with_users(*names)
    model.save_pretrained(folder)
    return model


def out(model: Any, *names: str) -> Tensor:
    """The logits of two rows, each with its named adapter; without names, with the active one."""
    inputs = {name: value for name, value in batches_for("llama", 1)[0].items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, **({"adapter_names": list(names)} if names else {})).logits


def answer(model: Any, name: str) -> Tensor:
    """The logits of a fixed batch with one adapter."""
    model.set_adapter(name)
    return logits(model.eval())


def answers(model: Any, *names: str) -> dict[str, Tensor]:
    return {name: answer(model, name) for name in names}


def rewrite(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor | None]]) -> None:
    """Change tensors of an adapter's file; `change` gets the key and value of its first R. None removes a tensor."""
    file = folder / WEIGHTS_NAME
    tensors = load_file(file)
    changed = tensors | change(*next(item for item in tensors.items() if item[0].endswith("lorasb_R")))
    kept = {key: value.contiguous() for key, value in changed.items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: object) -> None:
    """Change fields of an adapter's configuration."""
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def a_layer(model: nn.Module, name: str = "default") -> LoRASBLinear:
    """The first layer that has this adapter."""
    return next(iter(layers_with(model, name).values()))
