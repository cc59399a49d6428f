"""Rows of a complete model on a CPU, SmolLM2-135M in 4 bits: a training step and decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common.timing import measure, measured_dtype
from benchmarks.quantized.ways import PEFT_RANK, row


def smollm(way: str) -> Any:
    """SmolLM2-135M in 4 bits with an adapter, PEFT's on bitsandbytes' layers or ours on our own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import lorasb
    from lorasb.app.prepare import demo_model

    folder = demo_model()
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
    """Measure a training step of SmolLM2 and, in a separate process per way, its memory beyond the model."""
    calls = {way: training_step(way) for way in ("PEFT QLoRA r=32", "ours")}
    stats = measure({way: lambda _, call=call: call() for way, call in calls.items()}, "cpu", 4 * seconds)  # type: ignore[misc]
    memory = {way: _in_subprocess("step_memory", way)["bytes"] for way in calls}
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


def _in_subprocess(job: str, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.quantized.cpu", "--job", job, "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
