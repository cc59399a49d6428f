"""Cost of 4 bits in loss: LoRA-SB on the demo's model in 16 and in 4 bits, same data, seeds and schedule.

    python -m benchmarks.quantized.loss_curve [--seeds 2] [--output benchmarks/results]

Two runs of `lorasb finetune` per seed, which take about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_name, dtype_option, provenance, use_dtype
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings
from lorasb.utils.atomic_files import write_json

KEPT = ("eval_loss_before", "eval_loss_after", "eval_accuracy_after", "train_losses", "train_seconds", "base_bytes")


def run(bits: int, seed: int, examples: int) -> dict[str, Any]:
    """Fine-tune once; runs of one seed differ only in the weights' bits."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            bits=bits,
            dtype=dtype_name(),
            seed=seed,
            train_examples=examples,
            eval_examples=60,
            epochs=1.0,
            template="none",
            output=folder,
        )
        found = run_finetune(settings).summary
    return {"bits": bits, "seed": seed, "examples": examples, **{name: found[name] for name in KEPT}}


def differences(runs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds of 4 bits minus 16 bits, and half the range."""
    by_seed = {(one["bits"], one["seed"]): one[name] for one in runs}
    found = torch.tensor([by_seed[4, seed] - by_seed[16, seed] for bits, seed in by_seed if bits == 4])
    return float(found.mean()), float((found.max() - found.min()) / 2)


def lines(runs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the table's rows."""
    for one in runs:
        losses = (f"{one[name]:.4f}" for name in ("eval_loss_before", "eval_loss_after"))
        share, size = f"{one['eval_accuracy_after']:.0%}", f"{one['base_bytes'] / 1e6:.0f}"
        yield [str(one["bits"]), str(one["seed"]), *losses, share, size]


def main() -> None:
    """Run, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--output", type=Path, help="folder of four-bits-curve.json")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    runs = [run(bits, seed, options.examples) for seed in range(options.seeds) for bits in (16, 4)]
    head = ("bits", "seed", "before", "after", "answers right", "base in MB")
    show("the demo's task: loss in nats per token on held-out problems", head, lines(runs))
    for name, label in (("eval_loss_before", "before"), ("eval_loss_after", "after")):
        mean, half = differences(runs, name)
        print(f"4 bits minus 16 bits, {label}: {mean:+.4f} ± {half:.4f}")
    if options.output:
        write_json(options.output / "four-bits-curve.json", {**provenance(), "runs": runs})


if __name__ == "__main__":
    main()
