"""Tiny models with linears quantized by lorasb or other packages, and stand-ins for quantizers that need a GPU."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import peft.utils.quantization_utils
import pytest
import torch
from models import Batch, batches_for, llama
from storages import exact
from torch import Tensor, nn

import lorasb
from lorasb.quantization.quantized_weight import is_quantized, of_module

GROUP = 32  # weights that share a scale, in formats that have groups


def batches() -> list[Batch]:
    return batches_for("llama")


def with_linears(model: Any, make: Callable[[Any], nn.Module]) -> Any:
    """Replace the linears in a language model's blocks."""
    for name, layer in list(model.model.named_modules()):
        if hasattr(layer, "in_features"):
            model.model.set_submodule(name, make(layer))
    return model


def dense_linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return layer


class Scaled(nn.Module):
    """A linear of no known quantizer: int8 codes and one scale per row. It has no parameter and no `weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (layer.weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.codes * self.scales).to(x.dtype))


def to_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
    bnb, bias = pytest.importorskip("bitsandbytes"), layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": "nested" in kind}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=bias, **options)
        new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), **options)
    if bias:
        new.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return new.to("cpu")


def to_torchao(layer: nn.Linear, bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, torchao_int4_config() if bits == 4 else quantization.Int8WeightOnlyConfig())
    return layer


def torchao_int4_config() -> Any:
    quantization, groups = (importlib.import_module(f"torchao.quantization{part}") for part in ("", ".granularity"))
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups.PerGroup(GROUP))


def to_hqq(layer: nn.Linear, **options: Any) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return hqq.HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu", **options)


def to_quanto(layer: nn.Linear) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    new = quanto.QLinear.from_module(layer, weights=quanto.qint8)
    new.freeze()
    return new


def to_gptq(layer: nn.Linear) -> nn.Module:
    """Pack a linear with the package, using the nearest codes; its torch kernel runs on a CPU."""
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    scales = layer.weight.detach().view(layer.out_features, -1, GROUP).abs().amax(-1) / 7
    zeros = torch.full_like(scales, 8)
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    new = kernel(4, GROUP, sym=True, desc_act=False, **sizes)
    new.pack(layer, scales, zeros, (torch.arange(layer.in_features) // GROUP).int())
    new.post_init()
    return new


MAKERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": partial(to_bitsandbytes, kind="nf4"),
    "fp4 nested": partial(to_bitsandbytes, kind="fp4 nested"),
    "int8": partial(to_bitsandbytes, kind="int8"),
    "torchao int8": partial(to_torchao, bits=8),
    "torchao int4": partial(to_torchao, bits=4),
    "hqq": to_hqq,
    "quanto": to_quanto,
    "gptq": to_gptq,  # skipped without its package, which needs a newer torch than lorasb
    "unknown": Scaled,
}
STORED = ("own", "own nested", "nf4", "fp4 nested", "int8")  # lorasb reads their storage
CALLED = [kind for kind in MAKERS if kind not in STORED]  # their own forward is called
NAMES = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # "all-linear" omits unknown modules


def quantized(kind: str | Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama with quantized linears, in evaluation mode; its dimensions are multiples of `GROUP`."""
    torch.manual_seed(0)
    model = llama().to(dtype).eval()
    if kind in ("own", "own nested"):
        return lorasb.quantize(model, nested=kind == "own nested")
    return with_linears(model, MAKERS[kind] if isinstance(kind, str) else kind).eval()


def patched(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    known: dict[str, Any] = {"r": 4, "target_modules": NAMES, "check_base": kind in STORED}
    return lorasb.patch(quantized(kind, dtype), **known | options)


def initialized(kind: str, **options: Any) -> Any:
    model = patched(kind)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False, **options)
    return model


@torch.no_grad()
def values(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """W [out, in] of a linear without a bias: decoded from its storage, or its outputs for the unit vectors."""
    if is_quantized(layer):
        return exact(of_module(layer), dtype)
    return layer(torch.eye(layer.in_features, dtype=dtype)).t().contiguous()


def dense_twin(model: nn.Module) -> nn.Module:
    """Replace a model's linears with dense ones that compute the same function."""
    dtype = next(model.parameters()).dtype
    return with_linears(model, lambda layer: dense_linear(values(layer, dtype))).eval()


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, class_name: str, available: str) -> type[nn.Module]:
    """Create a class named like a quantizer's in a module named `module`; PEFT takes the package for installed."""
    kind = type(class_name, (Scaled,), {"__module__": module})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[module], class_name, kind, raising=False)
    monkeypatch.setattr(peft.utils.quantization_utils, available, lambda: True)
    return kind
