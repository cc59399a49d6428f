"""`Base`: the frozen module under a layer's adapters: its weight, dtype, device, forward and merging.

It is dense, quantized (in storage that our kernels read) or opaque (another quantizer's, whose forward is called).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..compat.accelerate import HOOK, PARTITIONED, hook_of
from ..compat.torch import BACKWARD_HOOKS, BACKWARD_PRE_HOOKS, HOOKS, PRE_HOOKS
from ..functional import dequantize, quantized_linear
from ..ops.calls import autocast_on
from ..quantization.quantized_weight import QuantizedWeight, of_module


class Base:
    """A frozen linear module under adapters, with a dense W [out, in], or [in, out] if `fan_in_fan_out`.

    Subclasses handle other kinds. The module is also the layer's `base_layer`; there is no reference to the layer
    itself, as a reference cycle would keep a dropped model in memory.
    """

    def __init__(self, module: nn.Module, fan_in_fan_out: bool = False) -> None:
        # Every forward reads it: `layer.base_layer` calls `nn.Module.__getattr__`, slower than a small product.
        self.module: Any = module
        self.fan_in_fan_out = fan_in_fan_out
        self.reads_storage = fan_in_fan_out  # whether our ops compute x Wᵀ regardless of the class's forward
        self.trains_bias = False  # our ops do not differentiate the bias: the module's own forward does
        self.casts = True  # PEFT's `disable_input_dtype_casting` switches it off

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out_features, in_features = self.weight().shape
        return out_features, in_features

    def parameter(self) -> Tensor:
        """The weight as it is stored: packed if quantized, [in, out] if transposed."""
        module = self.module
        weight = module._parameters.get("weight") if type(module) is nn.Linear else None
        if weight is not None:
            return weight
        weight = getattr(module, "weight", None)  # not a parameter if the module is parametrized
        return weight if isinstance(weight, Tensor) else first_tensor(module)

    def matrix(self, stored: Tensor) -> Tensor:
        """View a tensor in the weight's layout as W [out, in]."""
        return stored.t() if self.fan_in_fan_out else stored

    def folded(self, matrix: Tensor) -> Tensor:
        """Return a matrix [out, in] in the weight's layout."""
        return matrix.t() if self.fan_in_fan_out else matrix

    def weight(self) -> Tensor:
        """W [out, in]: a view of the weight, or dequantized."""
        return self.matrix(self.parameter())

    def merging_weight(self) -> Tensor:
        """The weight that adapters are merged into, in its layout; dequantized to `dtype` if it is quantized."""
        return self.parameter()

    def quantized(self) -> QuantizedWeight | None:
        """The storage of a quantized module; None for others."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The module's compute dtype; also the dtype of A and B."""
        return self.parameter().dtype

    @property
    def device(self) -> torch.device:
        """The device that the module runs on."""
        # accelerate keeps offloaded weights on `meta` between forwards; the hook that loads them names the device.
        device, weight = getattr(hook_of(self.module), "execution_device", None), self.parameter()
        return torch.device(device) if weight.is_meta and device is not None else weight.device

    def must_run(self) -> bool:
        """True if the module's own forward has to run, as reading its weight would bypass hooks or patches."""
        module = self.module
        own = vars(module)
        return (
            self.trains_bias
            or not (self.reads_storage or type(module).forward is nn.Linear.forward)
            or bool(own[PRE_HOOKS] or own[HOOKS] or own[BACKWARD_HOOKS] or own[BACKWARD_PRE_HOOKS])
            or "forward" in own  # accelerate and others patch the instance's forward
            or own.get(HOOK) is not None
            or hasattr(own["_parameters"].get("weight"), PARTITIONED)  # by DeepSpeed ZeRO-3 between forwards
        )

    def cast(self, x: Tensor) -> Tensor:
        """x in the module's dtype, as PEFT's layers cast it; unchanged under autocast, which chooses the dtype."""
        dtype = self.dtype
        if x.dtype == dtype or autocast_on(x.device.type) or not x.is_floating_point():
            return x
        return x.to(dtype) if self.casts else x

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | QuantizedWeight, Tensor | None]:
        """Operands of an op: x in the module's dtype, W [out, in] or its storage, and the bias."""
        parameters, weight = self.module._parameters, None
        if type(self.module) is nn.Linear:  # runs in every forward: `nn.Module.__getattr__` is slower
            weight, bias = parameters.get("weight"), parameters["bias"]
        if weight is None:
            weight, bias = self.parameter(), self.module.bias
        x = x if x.dtype == weight.dtype else self.cast(x)
        return x, weight.t() if self.fan_in_fan_out else weight, bias

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the module's own output, without adapters."""
        return cast(Tensor, self.module(x, *args, **kwargs))

    def refuse_computed_weight(self) -> None:
        """Raise a ValueError if the module computes W in every forward, so that merged values would be lost."""
        base = innermost(self.module)
        if hasattr(base, "parametrizations") or {"weight_g", "weight_v", "weight_orig"} & base._parameters.keys():
            raise ValueError(
                f"a {type(base).__name__} computes its weight in every forward (weight_norm, spectral_norm), and "
                "merged values would be lost: remove that first (parametrize.remove_parametrizations), or use "
                "lorasb.export_lora(model, path)"
            )

    def merged(self, weight: Tensor) -> Base:
        """Return a base with the merged values `weight`, in the weight's layout, as its weight."""
        parameter = self.parameter()  # the same parameter object, as others may refer to it
        if hasattr(parameter, "to_local"):  # FSDP2 gathers from the shard's own memory
            with torch.no_grad():
                parameter.copy_(weight)
        else:
            parameter.data = weight
        return self

    def restored(self) -> Base | None:
        """Return the base from before `merged`; None if the merged deltas have to be subtracted."""
        return None

    def moved(self) -> None:
        """Refresh values read from the module, after it was moved or cast."""


class ReplaceableBase(Base):
    """A module that is replaced by a dense one while adapters are merged."""

    def merging_weight(self) -> Tensor:
        return self.weight().to(self.dtype)

    def merged(self, weight: Tensor) -> Base:
        bias: Tensor | None = getattr(self.module, "bias", None)
        dense = linear_over(weight, None if bias is None else bias.detach().to(weight.dtype))
        return MergedBase(dense.train(self.module.training), self)


class MergedBase(Base):
    """The dense linear that stands in for a quantized or opaque module while adapters are merged."""

    def __init__(self, module: nn.Module, former: Base) -> None:
        super().__init__(module)
        self.former = former

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # The dense linear has the replaced module's compute dtype, so x is cast to it.
        y = super().forward(self.cast(x), *args, **kwargs)
        return y if autocast_on(x.device.type) else y.to(x.dtype)

    def restored(self) -> Base:
        return self.former


class QuantizedBase(ReplaceableBase):
    """A linear in 4 or 8 bits, in storage that our kernels read: its own forward does not run."""

    def __init__(self, module: nn.Module, int8_dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self.reads_storage = True
        self.int8_dtype = int8_dtype  # 8 bits: compute dtype, which the storage lacks; None: the bias's or fp16
        # The storage as read, and the parameter it was read from, with its version and pointer. All three are compared:
        # assigning a new parameter may reuse the address, in-place ops change the version alone, and
        # `parameter.data = ...` the pointer alone.
        self._read: tuple[QuantizedWeight, Tensor, int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantized().shape

    def quantized(self) -> QuantizedWeight:
        """The storage, cached until the parameter changes."""
        module, read = self.module, self._read
        parameter = module._parameters["weight"]
        if read is not None:
            # Fake tensors have no data_ptr, and reading it would break the graph; `moved` reads again.
            if torch.compiler.is_compiling():
                return read[0]
            if read[1] is parameter and read[2] == parameter._version and read[3] == parameter.data_ptr():
                return read[0]
        weight = of_module(module)
        self._read = weight, parameter, parameter._version, parameter.data_ptr()
        return weight

    def moved(self) -> None:
        # Reread the storage now, not in the next forward: a compiled forward uses the cached one unchecked.
        if self._read is not None and not self.module.weight.is_meta:
            self._read = None
            self.quantized()

    def weight(self) -> Tensor:
        return dequantize(self.quantized())

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype_of(self.quantized())

    def _dtype_of(self, found: QuantizedWeight) -> torch.dtype:
        """The layer's `compute_dtype` if set, else the dtype of W before quantization."""
        if found.kind == "int8" and self.int8_dtype:
            return self.int8_dtype
        dtype = getattr(self.module, "compute_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else found.dtype

    def operands(self, x: Tensor) -> tuple[Tensor, QuantizedWeight, Tensor | None]:
        found, bias = self.quantized(), self.module.bias
        x = x if x.dtype == self._dtype_of(found) else self.cast(x)
        # a quantized module may store its bias in another dtype
        return x, found, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs or self.must_run():
            return super().forward(x, *args, **kwargs)
        y = quantized_linear(*self.operands(x))
        return y if autocast_on(x.device.type) else y.to(x.dtype)


def linear_over(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a frozen linear over an existing weight [out, in] and bias, without allocation or random values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    # Not `register_parameter`: PEFT's `low_cpu_mem_usage=True` makes it move parameters to the meta device.
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return linear


def first_tensor(layer: nn.Module) -> Tensor:
    """Return a tensor of a layer's storage, which shows its device."""
    for tensors in (layer.parameters(), layer.buffers()):
        for tensor in tensors:
            return tensor
    raise ValueError(f"expected a layer with parameters or buffers, got a {type(layer).__name__} without")


def innermost(module: nn.Module) -> Any:
    """Return the module below the layers that adapt it."""
    while hasattr(module, "base_layer"):
        module = cast(nn.Module, module.base_layer)
    return module


@contextmanager
def factors_on_device(containers: list[nn.Module], name: str) -> Iterator[list[Tensor]]:
    """Yield an offloaded adapter's factors on their execution device, and offload them again afterwards."""
    # accelerate's hooks load a module's parameters around its forward, but a `ParameterDict` has no forward.
    if torch.is_grad_enabled() and any(c._parameters[name].requires_grad for c in containers):  # type: ignore[union-attr]
        raise RuntimeError(
            f"adapter {name!r} was offloaded with its base, so it cannot train: offload the base model first, then "
            "call lorasb.patch, which leaves A, R and B where the model runs; or evaluate under torch.no_grad()"
        )
    if any(hook_of(container) is None for container in containers):
        raise RuntimeError(f"adapter {name!r} is on the meta device: load a saved adapter, or move the model")
    with ExitStack() as stack:
        for container in containers:
            stack.enter_context(align_module_device(container))
        yield [c._parameters[name] for c in containers]  # type: ignore[misc]


def weight_present(base: nn.Module) -> AbstractContextManager[None]:
    """Load an offloaded base weight onto its execution device inside the block; other weights are not touched."""
    weight = base._parameters.get("weight")
    return align_module_device(base) if weight is not None and weight.is_meta else nullcontext()
