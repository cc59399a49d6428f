"""`FrozenBase`: access to the frozen linear under the adapters: weight, dtypes, device and forward.

The linear is dense, quantized (in storage that our kernels read) or opaque (another quantizer's, which is called).
`LoRASBLinear` inherits from it and adds the adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
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
from ..utils.deprecation import renamed_method
from ..utils.precision import FLOATS, SIXTEEN_BIT

CONFIGURATION = "get_apply_tensor_subclass"  # PEFT's name for how torchao quantized a model


def _configuration_lost() -> NoReturn:
    """In place of a configuration: PEFT's resolver takes no torchao layer without one."""
    raise ValueError("the model does not say how torchao quantized it: load it with transformers' TorchAoConfig")


@dataclass(frozen=True)
class OpaqueBase:
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
) -> OpaqueBase | None:
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
    return OpaqueBase(name, (out_features, in_features), _dtype(layer, default_dtype), backend, known)


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


class CachedWeight(NamedTuple):
    """A `QuantizedWeight` read from the base layer, and the state of the parameter that it was read from.

    All three of identity, version and pointer are compared, as each misses a kind of change: assigning a new parameter
    may reuse the address, in-place ops bump the version alone, and `parameter.data = ...` changes the pointer alone.
    """

    parameter: Any
    version: int
    pointer: int
    weight: QuantizedWeight


@dataclass
class ReplacedBase:
    """The quantized or opaque base layer while a merged dense one replaces it.

    A plain object around the module keeps `nn.Module.__setattr__` from registering it as a second submodule, which
    would put its weight into state dicts and parameter counts.
    """

    layer: nn.Module | None = None


class FrozenBase(nn.Module, BaseTunerLayer):
    """A frozen linear layer, W [out, in], or [in, out] if `fan_in_fan_out`.

    Args:
        in_features, out_features: dimensions of W.
        base_layer: the linear layer; dense, quantized to 4 or 8 bits, or opaque.
        fan_in_fan_out: the weight is stored transposed, as in `transformers.Conv1D`.
        octet_dtype: compute dtype of storage that does not record it (8 bits; the dtype of its bias, or fp16 without
            one, if None).
        resolver_options: of PEFT's resolver of quantized layers: `get_quantization_kwargs(model)`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        fan_in_fan_out: bool,
        octet_dtype: torch.dtype | None,
        resolver_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # a new module would be in training mode inside a model in eval mode
        self.fan_in_fan_out, self.octet_dtype = fan_in_fan_out, octet_dtype
        self._cached_weight: CachedWeight | None = None
        self._replaced = ReplacedBase()
        self.trains_bias = False  # our ops do not differentiate the bias: the base's own forward does
        keep_unpacked(base_layer)  # before any evaluation: the repacking is not always reversible
        unfolding = getattr(self, "unfolding", None)  # of a `LoRASBWeight`
        self._opaque = None if unfolding else find(base_layer, octet_dtype, resolver_options)
        known = unfolding or self._opaque or self.quantized()
        out_features, in_features = known.shape if known is not None else self.dense_weight().shape
        self.in_features, self.out_features = int(in_features), int(out_features)

    def opaque(self) -> OpaqueBase | None:
        """Return an opaque base layer's properties; None for others, and while a merged dense layer replaces it."""
        return self._opaque if self._replaced.layer is None else None

    def quantized(self) -> QuantizedWeight | None:
        """The storage of a quantized base layer, None for others; cached until the parameter changes."""
        # This runs in every forward: `nn.Module.__getattr__` takes longer than a small matrix product.
        base = self._modules["base_layer"]
        if base is None or type(base) is nn.Linear or not is_quantized(base):  # by type first: the common, cheap case
            return None
        cached, parameter = self._cached_weight, base._parameters["weight"]
        if cached is not None:
            # Fake tensors have no data_ptr, and reading it would break the graph; `_apply` refreshes the cache.
            if torch.compiler.is_compiling():
                return cached.weight
            fresh = cached.parameter is parameter and cached.version == parameter._version
            if fresh and cached.pointer == parameter.data_ptr():  # type: ignore[union-attr]
                return cached.weight
        weight = of_module(base)
        if weight is not None:
            version, pointer = parameter._version, parameter.data_ptr()  # type: ignore[union-attr]
            self._cached_weight = CachedWeight(parameter, version, pointer, weight)
        return weight

    quantised = renamed_method("quantised", "quantized")

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenBase:
        """Move or cast the layer, and read a quantized base again."""
        super()._apply(fn, recurse)
        # Read at once, not at the next forward: a compiled forward returns the cache without checking it.
        if self._cached_weight is not None and not self.base_layer.weight.is_meta:
            self._cached_weight = None
            self.quantized()
        return self

    def base_weight(self) -> Tensor:
        """The base layer's weight parameter, in its stored layout: packed if quantized, [in, out] if transposed."""
        # Of an opaque layer without a parameter of that name, some tensor of its storage.
        base = self._modules["base_layer"]  # as in `quantized`: every forward asks, and more than once
        weight = base._parameters.get("weight") if type(base) is nn.Linear else None
        if weight is not None:
            return weight
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        return weight if isinstance(weight, Tensor) else first_tensor(base)

    def dense_weight(self) -> Tensor:
        """W [out, in]: the base layer's weight or a transposed view of it, dequantized if it is quantized."""
        quantized, opaque = self.quantized(), self.opaque()
        if quantized is not None:
            return dequantize(quantized)
        if opaque is not None:
            return opaque.dequantize(self.base_layer)
        weight = self.base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    def set_base_weight(self, weight: Tensor) -> None:
        """Set the base weight to merged values; a layer that is not dense is replaced by a dense one with them."""
        if self.quantized() is None and self.opaque() is None:
            self.base_weight().data = weight  # the parameter object stays, with whatever refers to it
            return
        self._replaced.layer = self.base_layer
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        # On meta nothing is allocated or drawn from the random generator: both parameters are assigned below.
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.base_layer = dense.train(self.training)

    def refuse_computed_weight(self) -> None:
        """Raise a ValueError if the base computes W in every forward, so that merged values would be lost."""
        base = self.get_base_layer()
        named = [name.rpartition(".")[2] for name, _ in base.named_parameters(recurse=False)]
        if hasattr(base, "parametrizations") or {"weight_g", "weight_v", "weight_orig"} & set(named):
            raise ValueError(
                f"a {type(base).__name__} computes its weight in every forward (weight_norm, spectral_norm), and "
                "merged values would be lost: remove that first (torch.nn.utils.parametrize.remove_parametrizations), "
                "or keep the adapter apart: lorasb.export_lora(model, path)"
            )

    def restore_replaced_base(self) -> bool:
        """Undo `set_base_weight` over a quantized or opaque base; False if no base layer was replaced."""
        if self._replaced.layer is None:
            return False
        self.base_layer, self._replaced.layer = self._replaced.layer, None
        return True

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base computes in; also the dtype of A and B."""
        return self._dtype_of(self.quantized())

    def _dtype_of(self, quantized: QuantizedWeight | None) -> torch.dtype:
        if quantized is None:
            opaque = self.opaque()
            return self.base_weight().dtype if opaque is None else opaque.dtype
        if quantized.kind == "int8" and self.octet_dtype is not None:
            return self.octet_dtype
        return compute_dtype(self.base_layer, quantized)

    @property
    def core_dtype(self) -> torch.dtype:
        """The dtype of R: fp32 for a 16-bit base, where small updates would round to nothing, else the base's."""
        dtype = self.base_dtype
        return torch.float32 if dtype in SIXTEEN_BIT else dtype

    @property
    def execution_device(self) -> torch.device:
        """The device that the base runs on."""
        # accelerate keeps offloaded weights on `meta` between forwards; the hook that loads them names the device.
        hook = hook_of(self.base_layer)
        device = getattr(hook, "execution_device", None)
        weight = self.base_weight()
        return torch.device(device) if weight.is_meta and device is not None else weight.device

    def base_must_run(self) -> bool:
        """True if the base layer's own forward has to run, as reading its weight would bypass hooks or patches."""
        base: Any = self._modules["base_layer"]  # as in `quantized`
        if self.trains_bias or (self._opaque is not None and self._replaced.layer is None):
            return True
        # Conv1D (fan_in_fan_out) and quantized layers have forwards of their own, whose results we compute ourselves.
        plain = type(base).forward is nn.Linear.forward or self.fan_in_fan_out or is_quantized(base)
        return (
            not plain
            or has_hooks(base)
            or "forward" in vars(base)  # accelerate and others patch the instance's forward
            or hook_of(base) is not None
            or is_managed(base._parameters.get("weight"))  # partitioned by DeepSpeed ZeRO-3 between forwards
        )

    def on_base_dtype(self, x: Tensor, quantized: QuantizedWeight | None = None) -> Tensor:
        """x in the base's dtype, as PEFT's layers cast it; unchanged under autocast, which chooses the dtype itself."""
        dtype = self._dtype_of(quantized or self.quantized())
        if x.dtype == dtype or autocast_on(x.device.type) or not x.is_floating_point():
            return x
        return self._cast_input_dtype(x, dtype)

    def base_bias(self) -> Tensor | None:
        """The base layer's bias."""
        base: Any = self._modules["base_layer"]  # as in `quantized`: PEFT's property takes as long as a small product
        return cast("Tensor | None", base._parameters["bias"] if type(base) is nn.Linear else base.bias)

    def bias_like(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype; a quantized layer may store it in another."""
        bias = self.base_bias()
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the base layer alone. A quantized one is computed from its storage, without its module's forward."""
        quantized = None if args or kwargs or self.base_must_run() else self.quantized()
        # Merged into a quantized base, the dense layer has the quantized layer's compute dtype: x is cast for it, too.
        merged_dense = self._replaced.layer is not None
        if quantized is None and not merged_dense:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        input_dtype, x = x.dtype, self.on_base_dtype(x, quantized)
        if quantized is None:
            y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        else:
            y = quantized_linear(x, quantized, self.bias_like(x))
        return y if autocast_on(x.device.type) else y.to(input_dtype)


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


def check_linear(name: str, layer: nn.Module, opaque: OpaqueBase, trained: bool = True) -> None:
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


def _rows(opaque: OpaqueBase, device: torch.device) -> Tensor:
    return _probe(opaque.shape[1], device, opaque.dtype)


def _probe(in_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[0, x, 2x] for a random x; the global random state is not touched."""
    x = torch.randn(in_features, generator=torch.Generator().manual_seed(0))
    return torch.stack((torch.zeros_like(x), x, 2 * x)).to(device, dtype)


def _is_linear(y: Tensor) -> bool:
    zero, once, twice = y
    distance = (twice - zero - 2 * (once - zero)).norm()
    return bool(distance <= TOLERANCE * (twice - zero).norm())
