"""Opaque bases: frozen linears of other quantizers, called as they are, y = base(x), and never read in training.

LoRA-SB needs a layer's x and dy alone. W is read to merge, and by the inits that factor it, where the format has a way
to it: PEFT's resolver knows most, `quantization.formats` the others. Any other module with `in_features` and
`out_features` that is linear in x (`linearity`) works without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend, resolve_quantization_backend
from torch import Tensor, nn

from ..quantization.formats import PACKAGES, Format, format_of
from ..quantization.quantized_weight import is_quantized
from ..utils.dtypes import FLOATS

CONFIGURATION = "get_apply_tensor_subclass"  # PEFT's name for how torchao quantized a model


def _configuration_lost() -> NoReturn:
    """In place of a configuration: PEFT's resolver takes no torchao layer without one."""
    raise ValueError("the model does not say how torchao quantized it: load it with transformers' TorchAoConfig")


@dataclass(frozen=True)
class OpaqueBase:
    """What is known of an opaque linear. Its layer is passed to each method, as moving a model replaces its tensors.

    Attributes:
        name: of the format, or of the layer's class.
        shape: (out, in).
        dtype: that it computes in; also that of A and B.
        backend: PEFT's, if its resolver knows the format.
        format: ours, if `FORMATS` has it.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    backend: QuantizationBackend | None = None
    format: Format | None = None

    @property
    def known(self) -> bool:
        """True for a quantizer's format; False for a module that is taken to be linear by a probe."""
        return self.backend is not None or self.format is not None

    @torch.no_grad()
    def dequantize(self, layer: nn.Module) -> Tensor:
        """W [out, in] in `dtype`.

        Raises:
            ValueError: the format has no way to W.
        """
        try:
            weight = self._read(layer)
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this needs W, and {self.name} layers do not give it ({error}): keep the adapter beside its base "
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
        """A layer of the same format with the values of `weight` [out, in]; `layer` is used up.

        Raises:
            ValueError: the format has no way back.
        """
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
    """What is known of an opaque linear; None for a layer that our kernels read, or that is no linear.

    Args:
        layer: the base layer.
        default_dtype: the model's, for storage that does not say what it computes in.
        options: of PEFT's resolver: `get_quantization_kwargs(model)`.

    Raises:
        ImportError: the format's package is too old for PEFT; the message says which it takes.
    """
    if is_dense(layer) or is_quantized(layer) or hasattr(getattr(layer, "weight", None), "device_mesh"):
        return None
    backend = resolve_quantization_backend(layer, **({CONFIGURATION: _configuration_lost} | dict(options or {})))
    known = format_of(layer)
    if backend is None and known is None and not _computes_by_itself(layer):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about modules that it does not know
        in_features, out_features = _get_in_out_features(layer)
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
    """True for a module with features and a forward of its own: not nn.Linear's over a weight that it cannot take."""
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
    """A tensor of a layer's storage, which says the device.

    Raises:
        ValueError: the layer has none.
    """
    for tensors in (layer.parameters(), layer.buffers()):
        for tensor in tensors:
            return tensor
    raise ValueError(f"expected a layer with parameters or buffers, got a {type(layer).__name__} without")
