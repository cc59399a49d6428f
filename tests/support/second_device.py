"""Run the library on the CPU and on the device of `second_device.cpp`, and compare what both compute.

second_device.py LIBRARY FOLDER

Both use the CPU's kernels, with few differences in the order of sums. Prints a JSON object: task -> the largest
distance of a result, relative to its norm, on a device that has fp64 and then on one that has not; an error ends the
script.
"""

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import peft
import torch
from accelerate import dispatch_model
from models import batches_for, make, patched
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

import lorasb
from lorasb.quantization import quantized_weight
from lorasb.utils import precision

DEVICE = "second"
Results = dict[str, Tensor]


def placed(model: nn.Module | Mapping[str, Tensor], device: str) -> Any:
    """The model, or a batch, on a device."""
    if not isinstance(model, nn.Module):
        return {key: value.to(device) for key, value in model.items()}
    model.set_attn_implementation("eager")  # others choose their operations by the device
    model.set_experts_implementation("eager")
    return model.to(device)


def in_two_places(device: str) -> nn.Module:
    """A model on the CPU, but for its second block."""
    places = {"model.layers.1": device} | dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm"), "cpu")
    model = placed(make("llama"), "cpu")
    with mock.patch("torch.accelerator.empty_cache"):
        return dispatch_model(model, places | {"lm_head": "cpu", "model.rotary_emb": "cpu"}, "cpu", force_hooks=True)


def trained(device: str, family: str = "llama", model: nn.Module | None = None, **options: Any) -> Results:
    """The factors and gradients of a family, after initialization on the device."""
    fields = {name: options.pop(name) for name in ("init", "equivalent_gradient") if name in options}
    model = lorasb.patch(placed(make(family), device) if model is None else model, r=4, **fields)
    batches = [placed(batch, str(model.device)) for batch in batches_for(family)]
    if "init" not in fields:
        lorasb.initialize(model, batches, **{"lr": 1e-3, "progress": False} | options)
    model.train()
    model(**batches[0]).loss.backward()
    cores = {name: core for name, core in model.named_parameters() if core.requires_grad}
    gradients = {f"gradient of {name}": core.grad for name, core in cores.items() if core.grad is not None}
    found = gradients | {name: one.detach().clone() for name, one in model.named_parameters() if "lorasb_" in name}
    torch.optim.AdamW(cores.values(), lr=1e-3).step()
    return found


def saved(device: str, folder: Path) -> Results:
    """Logits of an adapter that was saved, loaded, summed with others and merged."""
    model, batch = placed(patched(), device), placed(batches_for("llama")[0], device)
    model.save_pretrained(folder / device)
    model = peft.PeftModel.from_pretrained(placed(make("llama"), device), folder / device)
    found = {"loaded": model(**batch).logits}
    hotswap_adapter(model, str(folder / device), "default", torch_device="cpu")
    found["swapped"] = model(**batch).logits
    model.add_adapter("other", lorasb.LoRASBConfig(r=4, init="random"))
    for kind in ("auto", "linear", "svd"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], kind, combination_type=kind)
        model.set_adapter(kind)
        found[kind] = model(**batch).logits
    found |= lorasb.adapter_delta(model, adapter_name="default")
    return found | {"merged": model.merge_and_unload()(**batch).logits}


def shared(device: str, folder: Path) -> Results:
    """Logits of mixed batches of adapters on one basis: resident ones, a joint basis, and a LoRA on it."""
    model, batch = placed(patched(), device), placed(batches_for("llama")[0], device)
    bank, found = lorasb.AdapterBank(model, resident=1), {}
    for name, value in (("ada", 0.01), ("grace", -0.01)):
        bank.add(name, {layer: torch.full((4, 4), value) for layer in bank.layers})
        found[name] = model(**batch, adapter_names=[name, "__base__"]).logits
    bank.detach()
    model.add_adapter("random", lorasb.LoRASBConfig(r=4, init="random"))
    lorasb.share_basis(model, ["default", "random"], "joint")
    plain = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(make("llama"), plain).save_pretrained(folder / f"lora of {device}")
    lorasb.project(model, folder / f"lora of {device}", "lora", basis="joint", most_lost=1.0)
    names = lorasb.add_adapters(model, ["alan", "mary"], basis="joint") or ["alan", "mary"]
    losses = lorasb.adapter_losses(model(**batch, adapter_names=names).logits, batch["labels"], names)
    return found | losses | {"joint": model(**batch, adapter_names=["random", "lora"]).logits}


def measured(device: str) -> Results:
    """Rates that trials and activations give."""
    model, batches = placed(patched(), device), [placed(batch, device) for batch in batches_for("llama", 20)]
    found = lorasb.find_lr(model, batches, lr=1e-3, progress=False)
    fit = lorasb.basis_fit(model, batches, num_samples=8)
    return {"rate": torch.tensor(found.lr), "share": torch.tensor(fit.share)}


def tasks(folder: Path) -> dict[str, Callable[[str], Results]]:
    """What is compared, by its name; each takes the device."""
    starts: dict[str, dict[str, Any]] = {
        "sign": {"stability": True},
        "exact SVD": {"family": "gpt2"},
        "per-sample": {"update": "per-sample"},
        "sgd": {"update": "sgd"},
        "automatic rate": {"lr": "auto"},
        "LoRA-XS": {"init": "lora-xs", "equivalent_gradient": True},
        "random": {"init": "random"},
        "experts": {"family": "mixtral"},
        "encoder": {"family": "roberta"},
    }
    found: dict[str, Callable[[str], Results]] = {
        name: lambda device, options=options: trained(device, **options) for name, options in starts.items()
    }
    cached = {"cache": folder / "signs"}  # the CPU writes it, and the device reads it
    return found | {
        "cache": lambda device: trained(device, **cached),
        "4 bits": lambda device: trained(device, model=lorasb.quantize(placed(make("llama"), device), nested=True)),
        "two devices": lambda device: trained(device, model=in_two_places(device)),
        "saved": lambda device: saved(device, folder),
        "shared": lambda device: shared(device, folder),
        "measured": measured,
    }


def register(library: str) -> None:
    """Load the device, under its name."""
    torch.ops.load_library(library)
    module = ModuleType(DEVICE)
    answers: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False}
    answers["get_amp_supported_dtype"] = [torch.bfloat16, torch.float16]
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    torch.utils.rename_privateuse1_backend(DEVICE)
    torch._register_device_module(DEVICE, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    quantized_weight.DEVICES = (*quantized_weight.DEVICES, DEVICE)
    torch.__future__.set_swap_module_params_on_conversion(True)  # or `.to` would separate tied weights


def main() -> None:
    """Compare every task."""
    library, folder = sys.argv[1], Path(sys.argv[2])
    register(library)
    expected = {name: task("cpu") for name, task in tasks(folder).items()}
    distances: dict[str, list[float]] = {name: [] for name in expected}
    for has_fp64 in (True, False):
        if not has_fp64:
            ctypes.CDLL(library).remove_fp64()
            precision.WITHOUT_FP64.add(DEVICE)
        for name, task in tasks(folder).items():
            found = task(DEVICE)
            assert expected[name].keys() == found.keys()
            pairs = [(value.double(), found[key].cpu().double()) for key, value in expected[name].items()]
            distances[name].append(max(float((right - left).norm() / left.norm()) for left, right in pairs))
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
