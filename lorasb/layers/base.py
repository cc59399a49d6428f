"""`Base`: the frozen module under a layer's adapters: its weight, dtype, device, forward and merging.

It is dense, quantized (in storage that our kernels read) or opaque (another quantizer's, which is called).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import torch
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend, resolve_quantization_backend
from torch import Tensor, nn

from ..compat import peft as private
from ..compat.accelerate import hook_of, is_managed
from ..compat.bitsandbytes import keep_unpacked
from ..compat.torch import has_hooks
from ..functional import dequantize, quantized_linear
from ..ops.autocast import autocast_on
from ..quantization.formats import PACKAGES, Format, format_of
from ..quantization.quantized_weight import QuantizedWeight, compute_dtype, is_quantized, of_module
from ..utils.precision import FLOATS

CONFIGURATION = "get_apply_tensor_subclass"  # PEFT's name for how torchao quantized a model


def _configuration_lost() -> NoReturn:
    """In place of a configuration: PEFT's resolver takes no torchao layer without one."""
    raise ValueError("the model does not say how torchao quantized it: load it with transformers' TorchAoConfig")


@dataclass(frozen=True)
class OpaqueFormat:
    """Properties of an opaque linear. Its layer is passed to each method, as moving a model replaces its tensors."""

    name: str  # of the format, or of the layer's class
    shape: tuple[int, int]  # (out, in)
    dtype: torch.dtype  # that it computes in; also that of A and B
    backend: QuantizationBackend | None = None  # PEFT's, if its resolver knows the format
    format: Format | None = None  # ours, if `FORMATS` has it

    @property
    def known(self) -> bool:
        """True for a quantizer's format; False for a module that is taken to be linear by a probe."""
        return self.backend is not None or self.format is not None

    @torch.no_grad()
    def dequantize(self, layer: nn.Module) -> Tensor:
        """W [out, in] in `dtype`."""
        try:
            weight = self._read(layer)
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this needs W, and {self.name} layers do not give it ({error}): keep the adapter apart from its base "
                "(save_pretrained, lorasb.export_lora); init='update' and init='random' do not read W"
            ) from error
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"expected a weight {list(self.shape)} of a {self.name} layer, got {list(weight.shape)}")
        return weight.detach().to(self.dtype)

    def _read(self, layer: nn.Module) -> Tensor:
        if self.format is not None:
            return self.format.dequantize(layer)
        if self.backend is not None:
            return self.backend.get_base_weight(layer)
        package = PACKAGES.get(type(layer).__name__)
        raise TypeError(f"pip install {package}, which knows how" if package else "no known format")

    @property
    def requantizes(self) -> bool:
        """True if a merged W can be quantized again in the same format."""
        if self.format is not None:
            return self.format.requantize is not None
        if isinstance(self.backend, TorchaoBackend) and self.backend.get_apply_tensor_subclass is _configuration_lost:
            return False
        return self.backend is not None and self.backend.supports_merge

    @torch.no_grad()
    def requantize(self, layer: nn.Module, weight: Tensor) -> nn.Module:
        """A layer of the same format with the values of `weight` [out, in]; `layer` is used up."""
        if not self.requantizes:
            raise ValueError(f"{self.name} layers cannot be quantized again: merge without requantize=True")
        if self.format is not None and self.format.requantize is not None:
            new = self.format.requantize(layer, weight)
        else:
            new = self._through_backend(layer, weight)
        return new.requires_grad_(False).train(layer.training)

    def _through_backend(self, layer: Any, weight: Tensor) -> nn.Module:
        """PEFT's backends set the weight of a tuner layer's base, or replace that base."""
        bias, holder = layer.bias, SimpleNamespace(base_layer=layer)
        holder.get_base_layer = lambda: holder.base_layer
        if self.backend is not None:
            self.backend.set_base_weight(holder, weight)
        if holder.base_layer.bias is None:  # HQQ's new layer is made of the weight alone
            holder.base_layer.bias = bias
        new: nn.Module = holder.base_layer
        return new


def find(
    layer: nn.Module, default_dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> OpaqueFormat | None:
    """Return the properties of an opaque linear; None for a layer that our kernels read, or that is no linear."""
    if is_dense(layer) or is_quantized(layer) or hasattr(getattr(layer, "weight", None), "device_mesh"):
        return None
    backend = resolve_quantization_backend(layer, **({CONFIGURATION: _configuration_lost} | dict(options or {})))
    known = format_of(layer)
    if backend is None and known is None and not _computes_by_itself(layer):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about modules that it does not know
        in_features, out_features = private.in_out_features(layer)
    if not isinstance(in_features, int) or not isinstance(out_features, int):
        return None
    name = known.name if known is not None else backend.backend_name if backend is not None else type(layer).__name__
    return OpaqueFormat(name, (out_features, in_features), _dtype(layer, default_dtype), backend, known)


def is_dense(layer: nn.Module) -> bool:
    """True for a linear whose weight is a plain matrix of floats."""
    weight: Any = getattr(layer, "weight", None)  # a parametrized weight is no parameter of that name
    # transformers' Conv1D by its name: layers do not import transformers
    is_linear = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    if not is_linear or not isinstance(weight, Tensor):
        return False
    return weight.dim() == 2 and weight.dtype in FLOATS and type(weight.data) is Tensor


def _computes_by_itself(layer: nn.Module) -> bool:
    """True for a module with features and its own forward: not nn.Linear's over a weight that it cannot take."""
    own = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    return own and hasattr(layer, "in_features") and hasattr(layer, "out_features")


def _dtype(layer: nn.Module, default: torch.dtype | None) -> torch.dtype:
    """The dtype that a layer computes in: as it says, its weight's, the model's, or that of its first floats."""
    stated, weight = getattr(layer, "compute_dtype", None), layer._parameters.get("weight")
    tensors = (tensor for part in (layer.parameters, layer.buffers) for tensor in part())
    first = next((tensor.dtype for tensor in tensors if tensor.dtype in FLOATS), None)
    candidates = (stated, None if weight is None else weight.dtype, default, first)
    return next((one for one in candidates if one in FLOATS), torch.get_default_dtype())


def first_tensor(layer: nn.Module) -> Tensor:
    """A tensor of a layer's storage, which says the device."""
    for tensors in (layer.parameters(), layer.buffers()):
        for tensor in tensors:
            return tensor
    raise ValueError(f"expected a layer with parameters or buffers, got a {type(layer).__name__} without")


class Base:
    """A frozen linear module under adapters, with a dense W [out, in], or [in, out] if `fan_in_fan_out`.

    Subclasses have other kinds. The module is the layer's `base_layer`, too; the layer itself is not known, as a cycle
    of references would keep a dropped model in memory.
    """

    def __init__(self, module: nn.Module, fan_in_fan_out: bool = False) -> None:
        # Every forward asks for it: `layer.base_layer`, by `nn.Module.__getattr__`, takes longer than a small product.
        self.module: Any = module
        self.fan_in_fan_out = fan_in_fan_out
        self.trains_bias = False  # our ops do not differentiate the bias: the module's own forward does
        self.casts = True  # PEFT's `disable_input_dtype_casting` switches it off

    def over(self, module: nn.Module) -> Base:
        """The base for another module in the place of this one."""
        return base_of(module, self.fan_in_fan_out)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out_features, in_features = self.weight().shape
        return int(out_features), int(in_features)

    def parameter(self) -> Tensor:
        """The weight as it is stored: packed if quantized, [in, out] if transposed."""
        module = self.module
        weight = module._parameters.get("weight") if type(module) is nn.Linear else None
        if weight is not None:
            return weight
        weight = getattr(module, "weight", None)  # of a module that is parametrized, no parameter of that name
        return weight if isinstance(weight, Tensor) else first_tensor(module)

    def matrix(self, stored: Tensor) -> Tensor:
        """W [out, in] of a tensor in the weight's layout; a view."""
        return stored.t() if self.fan_in_fan_out else stored

    def folded(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the weight's layout."""
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
        """The dtype that the module computes in; also that of A and B."""
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
        return (
            self.trains_bias
            or not self._reads_plainly(module)
            or has_hooks(module)
            or "forward" in vars(module)  # accelerate and others patch the instance's forward
            or hook_of(module) is not None
            or is_managed(module._parameters.get("weight"))  # partitioned by DeepSpeed ZeRO-3 between forwards
        )

    def _reads_plainly(self, module: nn.Module) -> bool:
        """True if a module's class computes x Wᵀ, which our ops do for it."""
        return type(module).forward is nn.Linear.forward or self.fan_in_fan_out

    def cast(self, x: Tensor) -> Tensor:
        """x in the module's dtype, as PEFT's layers cast it; unchanged under autocast, which chooses the dtype."""
        dtype = self.dtype
        if x.dtype == dtype or autocast_on(x.device.type) or not x.is_floating_point():
            return x
        return x.to(dtype) if self.casts else x

    def bias(self, like: Tensor | None = None) -> Tensor | None:
        """The module's bias, in the dtype of a tensor if given: a quantized module may store it in another."""
        module = self.module
        bias: Tensor | None = module._parameters["bias"] if type(module) is nn.Linear else module.bias
        return bias if bias is None or like is None or bias.dtype == like.dtype else bias.to(like.dtype)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | QuantizedWeight, Tensor | None]:
        """What an op takes: x in the module's dtype, W [out, in] or its storage, and the bias."""
        weight = self.parameter()
        x = x if x.dtype == weight.dtype else self.cast(x)
        return x, weight.t() if self.fan_in_fan_out else weight, self.bias()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the module alone."""
        return cast(Tensor, self.module(x, *args, **kwargs))

    def refuse_computed_weight(self) -> None:
        """Raise a ValueError if the module computes W in every forward, so that merged values would be lost."""
        base = innermost(self.module)
        named = [name.rpartition(".")[2] for name, _ in base.named_parameters(recurse=False)]
        if hasattr(base, "parametrizations") or {"weight_g", "weight_v", "weight_orig"} & set(named):
            raise ValueError(
                f"a {type(base).__name__} computes its weight in every forward (weight_norm, spectral_norm), and "
                "merged values would be lost: remove that first (torch.nn.utils.parametrize.remove_parametrizations), "
                "or keep the adapter apart: lorasb.export_lora(model, path)"
            )

    def merged(self, weight: Tensor) -> Base:
        """The base with merged values, in the weight's layout, in the weight's place."""
        self.parameter().data = weight  # the parameter object stays, with whatever refers to it
        return self

    def restored(self) -> Base | None:
        """The base as it was before `merged`; None if what was added has to be subtracted."""
        return None

    def moved(self) -> None:
        """Refresh what is kept of a module that was moved or cast."""


class _Kept(Base):
    """A module that a dense one replaces while adapters are merged."""

    def merged(self, weight: Tensor) -> Base:
        """A dense linear with merged values, in the module's place."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        # On meta nothing is allocated or drawn from the random generator: both parameters are assigned below.
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        return MergedBase(dense.train(self.module.training), self)


class MergedBase(Base):
    """The dense linear in place of a quantized or opaque module, which is kept."""

    def __init__(self, module: nn.Module, former: Base) -> None:
        super().__init__(module)
        self.trains_bias, self.casts, self.former = former.trains_bias, former.casts, former

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the dense linear, which has the former's compute dtype: x is cast for it."""
        y = super().forward(self.cast(x), *args, **kwargs)
        return y if autocast_on(x.device.type) else y.to(x.dtype)

    def restored(self) -> Base:
        """The former module, bit for bit."""
        return self.former


class QuantizedBase(_Kept):
    """A linear in 4 or 8 bits, in storage that our kernels read: its own forward does not run.

    Args:
        int8_dtype: compute dtype of 8 bits, whose storage does not record it; that of its bias, or fp16, if None.
    """

    def __init__(self, module: nn.Module, int8_dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self.int8_dtype = int8_dtype
        # The storage as read, and the parameter it was read from, with its version and pointer. All three are compared:
        # assigning a new parameter may reuse the address, in-place ops change the version alone, and
        # `parameter.data = ...` the pointer alone.
        self._read: tuple[QuantizedWeight, Any, int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        found = self.quantized()
        return found.shape if found is not None else super().shape

    def quantized(self) -> QuantizedWeight | None:
        """The storage, kept until the parameter changes; None for a module that is not filled yet."""
        module, read = self.module, self._read
        parameter = module._parameters["weight"]
        if read is not None:
            # Fake tensors have no data_ptr, and reading it would break the graph; `moved` refreshes what is kept.
            if torch.compiler.is_compiling():
                return read[0]
            if read[1] is parameter and read[2] == parameter._version and read[3] == parameter.data_ptr():
                return read[0]
        weight = of_module(module)
        if weight is not None:
            self._read = weight, parameter, parameter._version, parameter.data_ptr()
        return weight

    def moved(self) -> None:
        """Read the storage at once, not at the next forward: a compiled one returns what is kept without a check."""
        if self._read is not None and not self.module.weight.is_meta:
            self._read = None
            self.quantized()

    def weight(self) -> Tensor:
        """W [out, in], dequantized."""
        found = self.quantized()
        return super().weight() if found is None else dequantize(found)

    def merging_weight(self) -> Tensor:
        """W [out, in], dequantized to the compute dtype."""
        found = self.quantized()
        return super().merging_weight() if found is None else dequantize(found, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype that the storage records, or that was given for it."""
        found = self.quantized()
        if found is None:
            return super().dtype
        return self.int8_dtype if found.kind == "int8" and self.int8_dtype else compute_dtype(self.module, found)

    def _reads_plainly(self, module: nn.Module) -> bool:
        return True

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | QuantizedWeight, Tensor | None]:
        """What an op takes: x in the compute dtype, the storage, and the bias in x's dtype."""
        found = self.quantized()
        if found is None:
            return super().operands(x)
        x = self.cast(x)
        return x, found, self.bias(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y, computed from the storage, without the module's own forward."""
        found = None if args or kwargs or self.must_run() else self.quantized()
        if found is None:
            return super().forward(x, *args, **kwargs)
        wide = self.cast(x)
        y = quantized_linear(wide, found, self.bias(wide))
        return y if autocast_on(x.device.type) else y.to(x.dtype)


class OpaqueBase(_Kept):
    """Another quantizer's linear, or one that computes by itself: its own forward runs."""

    def __init__(self, module: nn.Module, format: OpaqueFormat) -> None:
        super().__init__(module)
        self.format = format

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.format.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the module computes in."""
        return self.format.dtype

    def weight(self) -> Tensor:
        """W [out, in]; raises a ValueError for a format that gives none."""
        return self.format.dequantize(self.module)

    def merging_weight(self) -> Tensor:
        """W [out, in]; raises a ValueError for a format that gives none."""
        return self.weight()

    def must_run(self) -> bool:
        """True: the weight is not read."""
        return True


def base_of(
    module: nn.Module,
    fan_in_fan_out: bool = False,
    int8_dtype: torch.dtype | None = None,
    resolver_options: Mapping[str, Any] | None = None,
) -> Base:
    """The base of the kind that a module is; arguments as of `LoRASBLinear`."""
    keep_unpacked(module)  # before any evaluation: the repacking is not always reversible
    if is_quantized(module):
        return QuantizedBase(module, int8_dtype)
    format = find(module, int8_dtype, resolver_options)
    return Base(module, fan_in_fan_out) if format is None else OpaqueBase(module, format)


def innermost(module: nn.Module) -> Any:
    """The module below the layers that adapt it."""
    while hasattr(module, "base_layer"):
        module = cast(nn.Module, module.base_layer)
    return module


@contextmanager
def factors_on_device(containers: list[nn.Module], name: str) -> Iterator[list[Tensor]]:
    """The factors of an offloaded adapter on their execution device; offloaded again afterwards."""
    # accelerate's hooks load a module's parameters around its forward, but a `ParameterDict` has no forward to wrap:
    # the hooks are called here.
    hooks = _hooks_of(containers, name)
    try:
        for hook, container in zip(hooks, containers, strict=True):
            hook.pre_forward(container)
        yield [c._parameters[name] for c in containers]  # type: ignore[misc]
    finally:
        for hook, container in zip(hooks, containers, strict=True):
            hook.post_forward(container, None)


def _hooks_of(containers: list[nn.Module], name: str) -> list[Any]:
    """accelerate's hook of each container."""
    if torch.is_grad_enabled() and any(c._parameters[name].requires_grad for c in containers):  # type: ignore[union-attr]
        raise RuntimeError(
            f"adapter {name!r} was offloaded with its base and cannot train so: offload the base model first, then "
            "call lorasb.patch, which leaves A, R and B where the model runs; or evaluate under torch.no_grad()"
        )
    hooks: list[Any] = [hook_of(container) for container in containers]
    if None in hooks:
        raise RuntimeError(f"adapter {name!r} is on the meta device: load a saved adapter, or move the model")
    return hooks


@contextmanager
def weight_present(base: nn.Module) -> Iterator[None]:
    """Inside, an offloaded weight of a base layer is on its execution device; other weights are not touched."""
    hook = hook_of(base)
    weight = base._parameters.get("weight")
    if hook is None or weight is None or not weight.is_meta:
        yield
        return
    hook.pre_forward(base)
    try:
        yield
    finally:
        hook.post_forward(base, None)


def has_weight_values(base: nn.Module) -> bool:
    """True if a base layer's storage has values, on a device or where accelerate has offloaded it."""
    weight = getattr(base, "weight", None)
    storage = [weight] if isinstance(weight, Tensor) else [*base.parameters(), *base.buffers()]
    offloaded = hook_of(base) is not None
    return bool(storage) and (offloaded or not any(tensor.is_meta for tensor in storage))


# Of the norm. Activations rounded to 8 bits, one scale for all rows, give 1e-2; a GELU gives 0.3 and more.
TOLERANCE = 0.05


def check_linear(name: str, layer: nn.Module, opaque: OpaqueFormat, trained: bool = True) -> None:
    """Run one probe of three rows."""
    x = _rows(opaque, first_tensor(layer).device)
    try:
        with torch.enable_grad():
            y = layer(x.requires_grad_())
            gradient = torch.autograd.grad(y.float().sum(), x, allow_unused=True)[0] if y.requires_grad else None
    except Exception as error:
        if opaque.known:  # its kernel may want another device, where the model is moved later
            return
        package = PACKAGES.get(type(layer).__name__)
        hint = f": pip install {package}" if package else ", or name it in exclude_modules"
        raise TypeError(
            f"target {name!r} is a {type(layer).__name__} that failed on x [3, in] ({error}){hint}"
        ) from error
    if y.shape != (3, opaque.shape[0]) or not _is_linear(y.detach().double()):
        raise TypeError(
            f"target {name!r} is a {type(layer).__name__}, and 2x does not give twice what x gives: an adapter beside "
            "it would not be a change of its weight. Name it in exclude_modules"
        )
    if trained and gradient is None:
        raise TypeError(
            f"target {name!r}, a {opaque.name} layer, has no gradient of its input: layers below it would learn "
            "nothing. Quantize weights only, or load the adapter with inference_mode=True"
        )


def has_own_result(layer: nn.Module) -> bool:
    """True for a dense nn.Linear whose class computes something else with its weight: Llama 4's router gives scores."""
    # A class whose forward takes other arguments than x, or that has no values yet, is taken for a linear.
    if type(layer).forward is nn.Linear.forward or not isinstance(layer, nn.Linear) or not has_weight_values(layer):
        return False
    weight = layer.weight
    if weight.dtype not in FLOATS or type(weight.data) is not Tensor:  # another quantizer's: its format is known
        return False
    try:
        with torch.no_grad():
            y = layer(_probe(layer.in_features, weight.device, weight.dtype))
    except Exception:
        return False
    return not isinstance(y, Tensor) or y.shape != (3, layer.out_features) or not _is_linear(y.double())


def _rows(opaque: OpaqueFormat, device: torch.device) -> Tensor:
    return _probe(opaque.shape[1], device, opaque.dtype)


def _probe(in_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[0, x, 2x] for a random x; the global random state is not touched."""
    x = torch.randn(in_features, generator=torch.Generator().manual_seed(0))
    return torch.stack((torch.zeros_like(x), x, 2 * x)).to(device, dtype)


def _is_linear(y: Tensor) -> bool:
    zero, once, twice = y
    distance = (twice - zero - 2 * (once - zero)).norm()
    return bool(distance <= TOLERANCE * (twice - zero).norm())
