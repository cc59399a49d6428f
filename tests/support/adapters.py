"""Find adapted layers and trained parameters, check that training works, and make a model with two adapters."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import batches_for, patched
from torch import nn

import lorasb
from lorasb.layers.adapted_layer import AdaptedLayer
from lorasb.layers.linear import LoRASBLinear


def layers(model: nn.Module, kind: type[nn.Module] = LoRASBLinear) -> dict[str, Any]:
    """Return adapted layers by their names in the base model."""
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, kind)}


def adapted(model: nn.Module) -> set[str]:
    return set(layers(model))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def check_training(model: nn.Module) -> None:
    """Check that only R trains, and that it lowers the loss with training and evaluation alternating."""
    assert trained(model) == {f"base_model.model.{name}.lorasb_R.default" for name in layers(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, batch, losses = torch.optim.AdamW(parameters, lr=5e-2), batches_for("llama")[0], []
    for _ in range(6):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(**batch)
            with model.disable_adapter():
                model(**batch)
    assert losses[-1] < losses[0] - 0.1


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves a model's modules, modes, hooks, flags, values and adapters as they were."""

    def parts() -> list[Any]:
        named = dict(model.named_modules())
        modules = [(type(m), m.training, "forward" in vars(m)) for m in named.values()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in named.values()]
        found = [m for m in named.values() if isinstance(m, AdaptedLayer)]
        states = [([*m.active_adapters], m.disable_adapters, m.merged, copy.deepcopy(m.adapters)) for m in found]
        configs = {name: copy.deepcopy(one.to_dict()) for name, one in getattr(model, "peft_config", {}).items()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        return [named, modules, hooks, states, hasattr(model, "peft_config"), configs, flags]

    before, values = parts(), copy.deepcopy(dict(model.state_dict()))
    yield
    assert parts() == before
    torch.testing.assert_close(dict(model.state_dict()), values, rtol=0.0, atol=0.0, equal_nan=True)


@functools.cache
def _two(family: str, shared: bool, targets: tuple[str, ...] | None) -> nn.Module:
    model = patched(family)
    model.add_adapter("second", lorasb.LoRASBConfig(r=4 if shared else 3, target_modules=targets and list(targets)))
    if shared:
        for layer in layers(model).values():
            core = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.05
            layer.set_factors("second", layer.lorasb_B["default"], core, layer.lorasb_A["default"])
    else:
        lorasb.initialize(model, batches_for(family)[1:], lr=5e-2, adapter_name="second", progress=False)
    return model.eval()


def two(family: str = "llama", shared: bool = False, target_modules: tuple[str, ...] | None = None) -> nn.Module:
    """A model with two adapters that have different effects; `shared`: they share A and B."""
    return copy.deepcopy(_two(family, shared, target_modules))
