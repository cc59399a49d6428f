"""A probe of a module that is adapted as a linear: f(2x) − f(0) = 2·(f(x) − f(0)), and backward reaches x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization.formats import PACKAGES
from ..utils.dtypes import FLOATS
from .offloading import has_weight_values
from .opaque_base import OpaqueBase, first_tensor

# Of the norm. Activations rounded to 8 bits, one scale for all rows, give 1e-2; a GELU gives 0.3 and more.
TOLERANCE = 0.05


def check_linear(name: str, layer: nn.Module, opaque: OpaqueBase, trained: bool = True) -> None:
    """Run one probe of three rows.

    Args:
        name: of the target, for messages.
        layer: an opaque base with values.
        opaque: what is known of it.
        trained: also ask for the gradient of x, without which layers below would learn nothing.

    Raises:
        TypeError: the module does not run, is not linear, or has no gradient.
    """
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
    """True for a dense nn.Linear whose class computes something else with its weight: Llama 4's router gives scores.

    A class whose forward takes other arguments than x, or that has no values yet, is taken for a linear.
    """
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
