"""What Muon's step of R costs beside AdamW's, over a training step of SmolLM2-135M on a CPU: in turns in one run.

    python -m benchmarks.training.optimizers [--seconds 40] [--output benchmarks/results]

LoRA-SB at r = 16, 64 and 96 on all linear layers, 4 x 128 tokens; --dtype is auto.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.timing import dtype_name, dtype_option, measure, measured_dtype, provenance, use_dtype
from lorasb.utils.atomic_files import write_json

RANKS = (16, 64, 96)
ADAMW, MUON = "AdamW", "Muon"


class Step:
    """Forward, backward and a step of one optimizer; the model is shared with the other's."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.ids = torch.randint(3, 49000, (4, 128), generator=torch.Generator().manual_seed(0))

    def __call__(self, _: int) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(r: int) -> dict[str, Step]:
    """Both optimizers over one model."""
    from transformers import AutoModelForCausalLM

    import lorasb
    from lorasb.app.prepare import demo_model

    base: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=measured_dtype())
    model = lorasb.patch(base, r=r, init="random").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # rates of zero: a step costs the same, and the model stays what it is
    adamw = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    return {ADAMW: Step(model, adamw), MUON: Step(model, lorasb.optim.Muon(trained, lr=0.0))}


def run(seconds: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Milliseconds of a step by rank and optimizer, and Muon's over AdamW's of the same round."""
    found = {}
    for r in RANKS:
        stats = measure(dict(steps(r)), "cpu", seconds / len(RANKS), least=10)
        found[str(r)] = {name: asdict(one) for name, one in stats.items()}
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--output", type=Path, help="folder of optimizers-cpu.json")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    found = run(options.seconds)
    view = Table(title=f"a training step of SmolLM2-135M, {dtype_name()}, 4 x 128 tokens")
    for name in ("r", ADAMW, MUON, "Muon / AdamW (20% to 80%)"):
        view.add_column(name, justify="right")
    for r, by_name in found.items():
        muon = by_name[MUON]
        ratio = f"{muon['ratio']:.3f} ({muon['ratio_p20']:.3f} to {muon['ratio_p80']:.3f})"
        view.add_row(r, f"{by_name[ADAMW]['p50']:.0f} ms", f"{muon['p50']:.0f} ms", ratio)
    Console(width=100).print(view)
    if options.output:
        write_json(options.output / "optimizers-cpu.json", {**provenance(), "ranks": found})


if __name__ == "__main__":
    main()
