"""Rows of one layer or one block on a CPU: dequantize, train, evaluate, block, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.timing import measure, measured_dtype
from benchmarks.quantized.ways import FEATURES, PEFT_RANK, RANK, ours, packed, row, with_peft

TRAIN_TOKENS, EVAL_TOKENS = (1, 16, 512), (1, 2, 4, 8, 16, 32, 64, 128, 512)


def dequantize(seconds: float) -> Iterator[dict[str, Any]]:
    """Dequantize entire weights, four in a row as in a model; milliseconds are for all four.

    In a row, because a call pays for writing back what the previous one left in the caches.
    """
    import bitsandbytes.functional as bnb

    from lorasb.functional import dequantize
    from lorasb.quantization.quantized_weight import of_module

    for size in (FEATURES, FEATURES // 2):
        layers = [packed(nn.Linear(size, size, bias=False, dtype=measured_dtype())) for _ in range(4)]
        pairs = [(layer.weight.data, layer.weight.quant_state) for layer in layers]
        if not torch.equal(dequantize(layers[0].weight), bnb.dequantize_4bit(*pairs[0])):
            raise RuntimeError("not bit-equal: not timed")
        copies = [_copying(of_module(layer), torch.empty(size, size, dtype=measured_dtype())) for layer in layers]

        def each(call: Callable[[Any], Any], over: list[Any]) -> Callable[[int], None]:
            def run(_: int) -> None:
                for one in over:
                    call(one)

            return run

        calls: dict[str, Callable[[int], Any]] = {
            "bitsandbytes": each(lambda pair: bnb.dequantize_4bit(*pair), pairs),
            "ours": each(dequantize, [layer.weight for layer in layers]),
            "bytes in and out": each(lambda copy: copy(0), copies),
        }
        yield row("dequantize", f"4 of {size} x {size}", measure(calls, "cpu", seconds))


def _copying(weight: Any, out: Tensor | None = None) -> Callable[[int], Any]:
    """Read a packed weight and its statistics, and write a dense one into existing memory."""
    parts = [tensor.view(torch.uint8).view(torch.float32) for tensor in weight.tensors[:2]]

    def run(_: int) -> None:
        for part in parts:
            part.sum()
        if out is not None:
            out.fill_(0.0)

    return run


def train(seconds: float) -> Iterator[dict[str, Any]]:
    """A layer in training, forward and backward."""
    dense = nn.Linear(FEATURES, FEATURES, bias=False, dtype=measured_dtype()).requires_grad_(False)
    peft = with_peft(nn.ModuleDict({"layer": packed(dense)})).train().get_submodule("layer")
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(measured_dtype())
    layer = ours(packed(dense)).train()
    for M in TRAIN_TOKENS:
        xs = [torch.randn(M, FEATURES, dtype=measured_dtype()).requires_grad_() for _ in range(2)]
        dy = torch.randn(M, FEATURES, dtype=measured_dtype())

        def call(module: Callable[[Tensor], Tensor], xs: list[Tensor] = xs, dy: Tensor = dy) -> Callable[[int], None]:
            def run(i: int) -> None:
                xs[i % 2].grad = None
                module(xs[i % 2]).backward(dy)
                for parameter in (*peft.parameters(), *layer.parameters()):
                    parameter.grad = None

            return run

        calls = {"Linear4bit + LoRA r=32": call(peft), "dense, bare": call(dense), "ours, r=96": call(layer)}
        yield row("train", f"{M} tokens, f+b", measure(calls, "cpu", seconds))


def evaluate(seconds: float) -> Iterator[dict[str, Any]]:
    """A layer in evaluation; bitsandbytes' has repacked its weight, after which it can no longer train."""
    from lorasb.functional import quantized_linear
    from lorasb.quantization.quantized_weight import of_module

    dense = nn.Linear(FEATURES, FEATURES, bias=False, dtype=measured_dtype()).requires_grad_(False)
    repacked, layer, weight = packed(dense).eval(), ours(packed(dense)).eval(), of_module(packed(dense))
    adapted = with_peft(nn.ModuleDict({"layer": packed(dense)})).eval().get_submodule("layer")
    if weight is None:
        raise RuntimeError("not quantized")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(measured_dtype())
    for M in EVAL_TOKENS:
        xs = [torch.randn(M, FEATURES, dtype=measured_dtype()) for _ in range(2)]

        def call(module: Callable[[Tensor], Tensor], xs: list[Tensor] = xs) -> Callable[[int], None]:
            def run(i: int) -> None:
                with torch.no_grad():
                    module(xs[i % 2])

            return run

        calls = {
            "Linear4bit": call(repacked),
            "dense": call(dense),
            "ours": call(lambda x: quantized_linear(x, weight)),
            "Linear4bit + LoRA r=32": call(adapted),
            "ours, r=96": call(layer),
            "bytes in": _copying(weight),
        }
        yield row("evaluate", f"{M} tokens", measure(calls, "cpu", seconds))


def block(seconds: float) -> Iterator[dict[str, Any]]:
    """One block of Mistral-7B, 512 tokens, forward and backward."""
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

    import lorasb

    config = MistralConfig()
    config._attn_implementation = "sdpa"
    dense: Any = MistralDecoderLayer(config, 0).to(measured_dtype()).requires_grad_(False)
    four = copy.deepcopy(dense)
    for _, parent in list(four.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, packed(child))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = lorasb.patch(nn.ModuleDict({"block": copy.deepcopy(four)}), r=RANK, target_modules=targets)
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lorasb_R") and name:
            a, b = (torch.linalg.qr(torch.randn(size, RANK)).Q for size in (layer.in_features, layer.out_features))
            layer.set_factors("default", b, torch.randn(RANK, RANK) * 0.05, a.t())
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=PEFT_RANK, lora_alpha=PEFT_RANK, target_modules=targets)
    blocks: dict[str, Any] = {
        "PEFT QLoRA r=32": inject_adapter_in_model(lora, four),
        "PEFT, dense, r=32": inject_adapter_in_model(lora, dense),
        "ours on 4 bits, r=96": adapted.base_model.model["block"],
    }
    x, ids = torch.randn(1, 512, FEATURES, dtype=measured_dtype()).requires_grad_(), torch.arange(512)[None]
    rotary = MistralRotaryEmbedding(config)(x, ids)
    calls: dict[str, Callable[[int], Any]] = {}
    for way, module in blocks.items():
        module.train()
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(measured_dtype())

        def run(_: int, module: Any = module) -> None:
            y = module(x, position_embeddings=rotary, position_ids=ids)
            (y[0] if isinstance(y, tuple) else y).sum().backward()
            x.grad = None
            module.zero_grad()

        calls[way] = run
    yield row("block", "Mistral-7B, 512 tokens, f+b", measure(calls, "cpu", seconds, least=6))


def memory(_: float) -> Iterator[dict[str, Any]]:
    """Bytes of quantized layers relative to 16-bit ones."""
    from lorasb.quantization.quantizer import quantize_4bit

    for nested in (False, True):
        packed_weight, state = quantize_4bit(torch.randn(FEATURES, FEATURES, dtype=measured_dtype()), nested=nested)
        tensors = [packed_weight, *state.as_tensors().values()]
        share = sum(t.numel() * t.element_size() for t in tensors) / (2 * FEATURES**2)
        yield {"row": "memory", "case": "nested statistics" if nested else "plain statistics", "share": share}
