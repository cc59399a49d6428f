"""4-bit bases on a CPU against bitsandbytes and PEFT, each row in turns in one run.

    python -m benchmarks.quantized.cpu [--row dequantize] [--seconds 6] [--output benchmarks/results]

Rows: dequantize, train, evaluate, block, step, decode, memory. Ours has r=96 (64 in SmolLM2, whose default it is),
PEFT's LoRA r=32. Layers are 4096 x 4096, NF4 in blocks of 64, plain statistics; --dtype is auto. Beside the peers run
what no way can do without: reading the packed bytes, writing a dense W, or the dense product.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common.timing import Stats, dtype_name, dtype_option, measure, measured_dtype, provenance, use_dtype
from benchmarks.training.initialization import new_memory
from lorasb.utils.atomic_files import write_json

FEATURES, RANK, PEFT_RANK, BLOCK = 4096, 96, 32, 64
TRAIN_TOKENS, EVAL_TOKENS = (1, 16, 512), (1, 2, 4, 8, 16, 32, 64, 128, 512)
Found = list[dict[str, Any]]


def packed(dense: nn.Linear) -> Any:
    """bitsandbytes' layer of the same weight."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=measured_dtype(),
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), quant_type="nf4", compress_statistics=False)
    return layer.to("cpu")


def ours(base: nn.Module, r: int = RANK) -> Any:
    """Our layer over a base, with factors as an initialization leaves them."""
    from lorasb.layers.linear import LoRASBLinear

    layer = LoRASBLinear(base, "default", r)
    left = torch.linalg.qr(torch.randn(layer.out_features, r)).Q
    right = torch.linalg.qr(torch.randn(layer.in_features, r)).Q
    layer.set_factors("default", left, torch.randn(r, r) * 0.05, right.t())
    return layer


def with_peft(model: nn.Module, **options: Any) -> Any:
    """PEFT's LoRA on every linear of a module."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=PEFT_RANK, lora_alpha=PEFT_RANK, target_modules=r".*", **options)
    return inject_adapter_in_model(config, model)


def row(name: str, case: str, stats: dict[str, Stats]) -> dict[str, Any]:
    """One measured case: milliseconds of every way, and their ratios to the first."""
    return {"row": name, "case": case, "ways": {way: asdict(found) for way, found in stats.items()}}


def dequantize(seconds: float) -> Iterator[dict[str, Any]]:
    """Whole weights, dense again, four in a row as a model has them: milliseconds are those of four.

    In a row, as what a call leaves in the caches to be written back is paid for by the next.
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
    """Read a packed weight and its statistics, and write a dense one over memory that is there."""
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
    """A layer in evaluation: bitsandbytes' after it has repacked its weight, which can no longer train then."""
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


def smollm(way: str) -> Any:
    """SmolLM2-135M in 4 bits with an adapter, PEFT's on bitsandbytes' layers or ours on our own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import lorasb
    from lorasb.recipes.bundled_model import EMBEDDED, resolve_model

    folder = resolve_model(EMBEDDED)
    if way == "ours":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=measured_dtype())
        adapted: Any = lorasb.patch(lorasb.quantize(model))
        batch = {"input_ids": torch.arange(64).view(4, 16), "labels": torch.arange(64).view(4, 16)}
        lorasb.initialize(adapted, [batch], lr=1e-4, progress=False)
        return adapted
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=measured_dtype()
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=measured_dtype(), quantization_config=quantization, device_map="cpu"
    )
    lora = LoraConfig(r=PEFT_RANK, lora_alpha=PEFT_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def training_step(way: str) -> Callable[[], None]:
    """One AdamW step of 4 x 128 tokens."""
    model = smollm(way).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, 49000, (4, 128), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step(seconds: float) -> Iterator[dict[str, Any]]:
    """A training step of SmolLM2; its memory beyond the model, each in a process of its own."""
    calls = {way: training_step(way) for way in ("PEFT QLoRA r=32", "ours")}
    stats = measure({way: lambda _, call=call: call() for way, call in calls.items()}, "cpu", 4 * seconds)  # type: ignore[misc]
    memory = {way: _elsewhere("step_memory", way)["bytes"] for way in calls}
    yield row("step", "SmolLM2, 4 x 128 tokens", stats) | {"new_bytes": memory}


def decode(seconds: float) -> Iterator[dict[str, Any]]:
    """Greedy decoding of 48 tokens after a prompt of 8."""
    calls: dict[str, Callable[[int], Any]] = {}
    prompt = torch.arange(100, 108)[None]
    for way in ("bitsandbytes + PEFT", "ours"):
        model = smollm(way).eval()

        def run(_: int, model: Any = model) -> None:
            with torch.no_grad():
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    min_new_tokens=48,
                    max_new_tokens=48,
                    do_sample=False,
                    pad_token_id=0,
                )

        calls[way] = run
    yield row("decode", "48 tokens", measure(calls, "cpu", 4 * seconds, least=6)) | {"tokens": 48}


def memory(_: float) -> Iterator[dict[str, Any]]:
    """Bytes of the quantized layers over those in 16 bits."""
    from lorasb.quantization.quantizer import quantize_4bit

    for nested in (False, True):
        packed_weight, state = quantize_4bit(torch.randn(FEATURES, FEATURES, dtype=measured_dtype()), nested=nested)
        tensors = [packed_weight, *state.as_tensors().values()]
        share = sum(t.numel() * t.element_size() for t in tensors) / (2 * FEATURES**2)
        yield {"row": "memory", "case": "nested statistics" if nested else "plain statistics", "share": share}


def _elsewhere(job: str, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.quantized.cpu", "--job", job, "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


ROWS: dict[str, Callable[[float], Iterator[dict[str, Any]]]] = {
    "dequantize": dequantize,
    "train": train,
    "evaluate": evaluate,
    "block": block,
    "step": step,
    "decode": decode,
    "memory": memory,
}


def view(found: Found) -> Table:
    """Medians, and each way's ratio to the first, for people."""
    table = Table(
        title=f"4 bits on a CPU, {dtype_name()}: medians, and times over the first way's in the same round "
        "(20th-80th percentile)"
    )
    for name in ("row", "case", "way", "ms", "ratio"):
        table.add_column(name, justify="right" if name in ("ms", "ratio") else "left")
    for one in found:
        for way, stats in one.get("ways", {}).items():
            ratio = f"{stats['ratio']:.2f} ({stats['ratio_p20']:.2f}-{stats['ratio_p80']:.2f})"
            table.add_row(one["row"], one["case"], way, f"{stats['p50']:.2f}", ratio)
        for name, value in one.items():
            if name not in ("row", "case", "ways"):
                table.add_row(one["row"], one["case"], name, *_plain(value))
    return table


def _plain(value: Any) -> tuple[str, str]:
    if isinstance(value, dict):
        return ", ".join(f"{way}: {size / 1e6:.0f} MB" for way, size in value.items()), ""
    return f"{value:.4g}", ""


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """So many processes beside this one, each of which keeps a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=list(ROWS), help="all unless given")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case")
    parser.add_argument("--output", type=Path, help="folder of four-bits-cpu.json, whose other rows stay")
    parser.add_argument("--busy", type=int, default=0, help="other processes that keep a core busy meanwhile")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if options.job == "step_memory":
        call = training_step(options.way)
        print(json.dumps({"bytes": new_memory(call)}))
        return
    found: Found = []
    started = time.perf_counter()
    with neighbors(options.busy):
        for name in options.row or ROWS:
            found += ROWS[name](options.seconds)
    if options.busy:
        found = [one | {"case": f"{one['case']}, {options.busy} busy neighbors"} for one in found]
    Console(width=150).print(view(found))
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        _write(options.output / "four-bits-cpu.json", found)


def _write(path: Path, found: Found) -> None:
    """Put these cases in place of their like; where and when is said of each."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    fresh, at = {(one["row"], one["case"]) for one in found}, provenance()
    machine = at.pop("machine")
    rows = [one for one in kept if (one["row"], one["case"]) not in fresh] + [one | at for one in found]
    write_json(path, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
