"""A training step of SmolLM2-135M on a CPU: LoRA-SB r=96 against PEFT's LoRA, r=32 and r=6 (as many parameters).

    python -m benchmarks.training.step [--seconds 60] [--output benchmarks/results]

4 x 128 tokens, AdamW, all linear layers, in turns in one run; --dtype is auto. It also counts the bytes that autograd
keeps for backward, the bytes of the optimizer's state, and trained parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.tables import show
from benchmarks.common.timing import (
    dtype_name,
    dtype_option,
    measure,
    measured_dtype,
    provenance,
    saved_bytes,
    use_dtype,
)
from benchmarks.quantized.ways import PEFT_RANK, RANK
from lorasb.utils.atomic_files import write_json

OURS, PEFT = f"LoRA-SB, r={RANK}", f"PEFT LoRA, r={PEFT_RANK}"
EQUAL = "PEFT LoRA, r=6"  # trains as many parameters as ours, within 6%
RANK_OF = {PEFT: PEFT_RANK, EQUAL: 6}
HEAD = ("", PEFT, EQUAL, OURS, f"ours over r={PEFT_RANK}", "ours over r=6")


def as_loaded(model: Any) -> Any:
    """The base as transformers loads it."""
    return model


def model_of(way: str, convert: Callable[[Any], Any] = as_loaded) -> Any:
    """SmolLM2, its base converted, with an adapter on all linear layers of its blocks."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import lorasb
    from lorasb.app.prepare import demo_model

    model = convert(AutoModelForCausalLM.from_pretrained(demo_model(), dtype=measured_dtype()))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if way in RANK_OF:
        r = RANK_OF[way]
        lora = LoraConfig(r=r, lora_alpha=r, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(model, lora).train()
    adapted: Any = lorasb.patch(model, r=RANK, target_modules=targets)
    batch = {"input_ids": torch.arange(64).view(4, 16), "labels": torch.arange(64).view(4, 16)}
    lorasb.initialize(adapted, [batch], lr=1e-4, progress=False)
    return adapted.train()


class Training:
    """One model, its optimizer and a batch."""

    def __init__(self, way: str, convert: Callable[[Any], Any] = as_loaded) -> None:
        self.model = model_of(way, convert)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.ids = torch.randint(3, 49000, (4, 128), generator=torch.Generator().manual_seed(0))

    def loss(self) -> Tensor:
        """The loss of a forward."""
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    def __call__(self, _: int) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward, without parameters and buffers."""
        own = {tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        return saved_bytes(self.loss, own)

    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two moments."""
        state = self.optimizer.state.values()
        return sum(t.numel() * t.element_size() for one in state for t in one.values() if t.dim() > 0)


def run(seconds: float) -> dict[str, dict[str, Any]]:
    """Measure every figure of all ways."""
    ways = {way: Training(way) for way in (PEFT, EQUAL, OURS)}
    stats = measure(dict(ways), "cpu", seconds, least=6)
    return {
        way: {
            **asdict(stats[way]),
            "kept_bytes": one.kept_bytes(),
            "optimizer_bytes": one.optimizer_bytes(),
            "trained": sum(p.numel() for p in one.trained),
        }
        for way, one in ways.items()
    }


def rows(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the table's rows, with ratios to both of PEFT's LoRAs."""
    ours, others = found[OURS], [found[way] for way in (PEFT, EQUAL)]
    times = [f"{one['p50']:.0f} ms" for one in (*others, ours)]
    spread = f"{ours['ratio']:.2f}x ({ours['ratio_p20']:.2f}-{ours['ratio_p80']:.2f})"
    yield ["time", *times, spread, f"{ours['ratio'] / others[1]['ratio']:.2f}x"]  # both are ratios to the first
    for name, label in (("kept_bytes", "kept for backward"), ("optimizer_bytes", "optimizer's state")):
        sizes = [f"{one[name] / 1e6:.1f} MB" for one in (*others, ours)]
        yield [label, *sizes, *(f"{ours[name] / one[name]:.2f}x" for one in others)]
    counts = [f"{one['trained']:,}" for one in (*others, ours)]
    yield ["trained parameters", *counts, *(f"{ours['trained'] / one['trained']:.2f}x" for one in others)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="folder of step-cpu.json")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    torch.manual_seed(0)
    found = run(options.seconds)
    show(f"a training step of SmolLM2-135M, {dtype_name()}, 4 x 128 tokens", HEAD, rows(found))
    if options.output:
        write_json(options.output / "step-cpu.json", {**provenance(), "ways": found})


if __name__ == "__main__":
    main()
