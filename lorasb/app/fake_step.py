"""A training step of a model that has no memory: its forward, backward and optimizer on fake tensors, byte by byte.

The model is made from its config on the meta device and patched as any model is. Then each of its tensors becomes a
fake one of torch's, which has a shape and no storage: the real code of the model, the layers and AdamW runs, and what
it would keep is counted instead of guessed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compat import torch as private
from ..compat.torch import storage_key
from ..layers.adapted_layer import AdaptedLayer
from .prepare import checkpoint_activations


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation returns, once, until it is freed.

    What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        now: bytes of storages that are alive.
        peak: their maximum since the block began, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._seen:
            return
        self._seen[key] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a training step of batch x seq tokens."""

    base: int  # the base model's parameters and buffers, as they are before any quantization
    factors: int  # A and B
    cores: int  # R
    optimizer: int  # R's gradients and AdamW's moments
    saved: int  # what the forward leaves for backward, with the logits
    peak: int  # all of these that are alive at the worst moment, and temporaries


def count_step(model: nn.Module, batch: int, seq: int, checkpointing: bool = False) -> StepBytes:
    """The bytes of a step of a patched model on the meta device, which becomes fake."""
    _mark_initialized(model)
    if checkpointing:
        model.config.use_cache = False  # type: ignore[union-attr]  # transformers says so, too
        checkpoint_activations(model.get_base_model())  # type: ignore[operator]
    with private.fake_tensor_mode(), _GroupedProducts(), LiveBytes() as live:
        base, factors, cores = _become_fake(model)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        static = live.now
        before = live.now
        loss = _loss(model, batch, seq)
        saved = live.now - before
        loss.backward()
        optimizer.step()
        del loss
        return StepBytes(base, factors, cores, live.now - static, saved, live.peak)


class _GroupedProducts(TorchDispatchMode):
    """Experts' grouped products in any dtype, as a CPU computes them: torch's fake ones take bf16 alone."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet is None or packet is not getattr(torch.ops.aten, "_grouped_mm", None):
            return func(*args, **(kwargs or {}))
        narrow = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*narrow, **(kwargs or {})).to(args[0].dtype)


def _loss(model: nn.Module, batch: int, seq: int) -> torch.Tensor:
    """In a function, so that nothing but the loss is held on to."""
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    output: Any = model(input_ids=ids, labels=ids)
    loss: torch.Tensor = output["loss"]
    return loss


def _mark_initialized(model: nn.Module) -> None:
    """Let adapters train that have no values, as nothing here has."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            for name in module.adapters:
                module.adapters[name].initialized = True


def _become_fake(model: nn.Module) -> tuple[int, int, int]:
    """Put fake tensors in the place of all parameters and buffers, tied ones once; bytes of base, A and B, and R."""
    made: dict[int, torch.Tensor] = {}
    replaced = []  # kept, so that no id comes twice
    sizes = [0, 0, 0]
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None or id(tensor) in made:
                    tensors[key] = None if tensor is None else made[id(tensor)]
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, tensor.requires_grad)
                replaced.append(tensor)
                made[id(tensor)] = tensors[key] = fake
                place = 2 if ".lorasb_R" in name else 1 if ".lorasb_" in name else 0
                sizes[place] += fake.numel() * fake.element_size()
    return sizes[0], sizes[1], sizes[2]
