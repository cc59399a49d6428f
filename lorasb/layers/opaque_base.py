"""`OpaqueBase`: a linear whose own forward runs: another quantizer's, or a module that a probe finds linear."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend, resolve_quantization_backend
from torch import Tensor, nn

from ..compat import peft as private
from ..compat.accelerate import hook_of
from ..compat.bitsandbytes import keep_unpacked
from ..quantization.quantized_weight import is_quantized
from ..utils.precision import FLOATS, double
from .base import Base, QuantizedBase, ReplaceableBase, first_tensor, linear_over

# Packages by their layers' class names, for messages: a layer is recognized only where its package is installed.
PACKAGES = {
    "HQQLinear": "hqq",
    "QuantizedLinear": "aqlm",
    "EetqLinear": "eetq",
    "QuantLinear": "gptqmodel",
    "WQLinear_GEMM": "gptqmodel",
    "PatchedLinear": "neural-compressor",
}


class QuantoBackend(QuantizationBackend):
    """optimum-quanto's linears, which PEFT's resolver does not know."""

    backend_name, supports_merge = "optimum-quanto", True

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """W [out, in]."""
        return cast(Tensor, base_layer.weight.dequantize())

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Replace the layer's base by one with the values of `weight_data` [out, in]."""
        old, kind = peft_layer.base_layer, importlib.import_module("optimum.quanto").QLinear
        dense = linear_over(weight_data, old.bias)
        peft_layer.base_layer = kind.from_module(dense, weights=old.weight_qtype, activations=old.activation_qtype)
        peft_layer.base_layer.freeze()  # quanto's term for quantizing W once instead of in every call


class GPTQBackend(QuantizationBackend):
    """gptqmodel's linears, whose weight PEFT's backend does not read."""

    backend_name = "GPTQ"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """W [out, in]."""
        return cast(Tensor, base_layer.dequantize_weight().t())


# by package and name of the layer's class or one of its base classes: needs no import
BACKENDS = {("optimum", "QLinear"): QuantoBackend, ("gptqmodel", "BaseQuantLinear"): GPTQBackend}


class OpaqueBase(ReplaceableBase):
    """Another quantizer's linear, or one that a probe finds linear: its own forward runs."""

    shape: tuple[int, int] = (0, 0)  # set once, in place of the base class's properties
    dtype: torch.dtype = torch.float32

    def __init__(
        self,
        module: nn.Module,
        name: str,  # of the format, or of the module's class
        shape: tuple[int, int],
        dtype: torch.dtype,  # compute dtype
        backend: QuantizationBackend | None,  # PEFT's or one of `BACKENDS`, for a quantizer's format
    ) -> None:
        super().__init__(module)
        self.name, self.shape, self.dtype, self.backend = name, shape, dtype, backend

    def moved(self) -> None:
        self.dtype = _dtype(self.module, self.dtype)

    @torch.no_grad()
    def weight(self) -> Tensor:
        try:
            if self.backend is None:
                package = PACKAGES.get(type(self.module).__name__)
                raise TypeError(f"pip install {package}, which can read it" if package else "no known format")
            weight = self.backend.get_base_weight(self.module)
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this needs the dense W, which cannot be read from {self.name} layers ({error}): keep the adapter "
                "separate from its base (save_pretrained, lorasb.export_lora); init='update' and 'random' do not read W"
            ) from error
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"expected a weight {list(self.shape)} of a {self.name} layer, got {list(weight.shape)}")
        return weight.detach().to(self.dtype)

    def must_run(self) -> bool:
        return True

    @property
    def requantizes(self) -> bool:
        """True if a merged W can be quantized again in the same format."""
        return self.backend is not None and self.backend.supports_merge

    @torch.no_grad()
    def requantized(self, weight: Tensor) -> OpaqueBase:
        """Return a base with the values of `weight` [out, in], if the format `requantizes`; this module is consumed."""
        # Backends set the weight of a tuner layer's base, or replace that base.
        holder = SimpleNamespace(base_layer=self.module)
        holder.get_base_layer = lambda: holder.base_layer
        bias = self.module.bias
        cast(QuantizationBackend, self.backend).set_base_weight(holder, weight)
        new: nn.Module = holder.base_layer
        if new.bias is None:  # HQQ's new layer is made of the weight alone
            new.bias = bias
        return OpaqueBase(new.requires_grad_(False), self.name, self.shape, self.dtype, self.backend)


def make_base(
    module: nn.Module,
    fan_in_fan_out: bool = False,
    octet_dtype: torch.dtype | None = None,
    resolver_options: Mapping[str, object] | None = None,
) -> Base:
    """Return the kind of base that fits a module; arguments as of `LoRASBLinear`."""
    keep_unpacked(module)  # before any evaluation: the repacking is not always reversible
    if is_quantized(module):
        return QuantizedBase(module, octet_dtype)
    return find(module, octet_dtype, resolver_options) or Base(module, fan_in_fan_out)


def find(
    layer: nn.Module, default_dtype: torch.dtype | None = None, options: Mapping[str, object] | None = None
) -> OpaqueBase | None:
    """Return the base of an opaque linear; None for a layer that our kernels read or that is not linear."""
    if is_dense(layer) or is_quantized(layer) or hasattr(getattr(layer, "weight", None), "device_mesh"):
        return None
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(layer).__mro__}
    backend = next((make() for key, make in BACKENDS.items() if key in kinds), None)
    if backend is None:
        # PEFT's resolver rejects torchao layers without an option that shows how torchao quantized the model.
        torchao = {"get_apply_tensor_subclass": NotImplemented, **(options or {})}
        backend = resolve_quantization_backend(layer, **torchao)
        if isinstance(backend, TorchaoBackend) and backend.get_apply_tensor_subclass is NotImplemented:
            backend.supports_merge = False
    if backend is None:
        # needs in/out_features and its own forward: nn.Linear's cannot run on such a weight
        own = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
        if not (own and hasattr(layer, "in_features") and hasattr(layer, "out_features")):
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about modules that it does not know
        in_features, out_features = private.in_out_features(layer)
    if not isinstance(in_features, int) or not isinstance(out_features, int):
        return None
    name = type(layer).__name__ if backend is None else backend.backend_name
    return OpaqueBase(layer, name, (out_features, in_features), _dtype(layer, default_dtype), backend)


def is_dense(layer: nn.Module) -> bool:
    """True for a linear whose weight is a plain matrix of floats."""
    # transformers' Conv1D by its name: layers do not import transformers
    return (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and has_dense_weight(layer)


def has_dense_weight(layer: nn.Module) -> bool:
    """True if a layer's weight is a plain matrix of floats."""
    weight = getattr(layer, "weight", None)  # getattr: a parametrized weight is not a parameter
    # Exactly Tensor: subclasses (DTensor, quantized tensors) have different storage behind this interface.
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        return False
    return weight.dim() == 2 and weight.dtype in FLOATS


def _dtype(layer: nn.Module, default: torch.dtype | None) -> torch.dtype:
    """Return a layer's compute dtype: as it states, its weight's, the model's, or its first float tensor's."""
    stated, weight = getattr(layer, "compute_dtype", None), layer._parameters.get("weight")
    tensors = (tensor for part in (layer.parameters, layer.buffers) for tensor in part())
    first = next((tensor.dtype for tensor in tensors if tensor.dtype in FLOATS), None)
    candidates = (stated, None if weight is None else weight.dtype, default, first)
    return next((one for one in candidates if one in FLOATS), torch.get_default_dtype())


# Relative error. Activations rounded to 8 bits, one scale for all rows, give 1e-2; a GELU gives 0.3 and more.
TOLERANCE = 0.05


def check_linear(name: str, opaque: OpaqueBase, trained: bool) -> None:
    """Raise a TypeError if a target fails on a probe of three rows, is not linear, or cannot pass on gradients."""
    layer: nn.Module = opaque.module
    kind = type(layer).__name__
    x = _probe(opaque.shape[1], first_tensor(layer).device, opaque.dtype)
    try:
        with torch.enable_grad():
            y = layer(x.requires_grad_())
            gradient = torch.autograd.grad(y.float().sum(), x, allow_unused=True)[0] if y.requires_grad else None
    except Exception as error:
        if opaque.backend is not None:  # its kernel may need another device, to which the model is moved later
            return
        hint = f": pip install {PACKAGES[kind]}" if kind in PACKAGES else ", or name it in exclude_modules"
        raise TypeError(f"target {name!r} is a {kind} that failed on x [3, in] ({error}){hint}") from error
    if y.shape != (3, opaque.shape[0]) or not _is_linear(double(y.detach())):
        raise TypeError(f"target {name!r} ({kind}) is not linear, as 2x does not give 2y: name it in exclude_modules")
    if trained and gradient is None:
        raise TypeError(
            f"target {name!r}, a {opaque.name} layer, has no gradient of its input, so layers below it would "
            "learn nothing. Quantize weights only, or load the adapter with inference_mode=True"
        )


def has_weight_values(base: nn.Module) -> bool:
    """True if a base layer's storage has values, on a device or offloaded by accelerate."""
    weight = getattr(base, "weight", None)
    storage = [weight] if isinstance(weight, Tensor) else [*base.parameters(), *base.buffers()]
    offloaded = hook_of(base) is not None
    return bool(storage) and (offloaded or not any(tensor.is_meta for tensor in storage))


def has_own_result(layer: nn.Module) -> bool:
    """True for a dense nn.Linear whose class computes something else, as Llama 4's router, which returns scores."""
    # A layer whose forward takes other arguments than x, or that has no values yet, counts as a linear; one that
    # rejects [rows, in_features] (DeepSeek-V4's grouped linear) does not.
    if type(layer).forward is nn.Linear.forward or not isinstance(layer, nn.Linear):
        return False
    if not is_dense(layer) or not has_weight_values(layer):  # not dense: another quantizer's, whose format is known
        return False
    try:
        with torch.no_grad():
            y = layer(_probe(layer.in_features, layer.weight.device, layer.weight.dtype))
    except (RuntimeError, IndexError):
        return True
    except Exception:
        return False
    return not isinstance(y, Tensor) or y.shape != (3, layer.out_features) or not _is_linear(double(y))


def _probe(in_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[0, x, 2x] for a random x; the global random state is not touched."""
    x = torch.randn(in_features, generator=torch.Generator().manual_seed(0), device="cpu")
    return torch.stack((torch.zeros_like(x), x, 2 * x)).to(device, dtype)


def _is_linear(y: Tensor) -> bool:
    zero, once, twice = y
    distance = (twice - zero - 2 * (once - zero)).norm()
    return bool(distance <= TOLERANCE * (twice - zero).norm())
