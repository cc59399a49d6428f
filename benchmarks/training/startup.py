"""Time before training begins: imports, and patching a model.

    python -m benchmarks.training.startup [--rounds 9] [--output benchmarks/results]

Imports are timed in turns, each in a fresh process: `import torch`; `import torch, lorasb`, which imports nothing else
yet; `import torch, peft`; and `import torch, lorasb; lorasb.patch`, a first use, which imports PEFT and transformers.
Patching is timed on SmolLM2 (30 blocks, 210 linears) and on a Mistral-7B on the meta device (32 blocks, 224 linears),
each after an untimed round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_option, measured_dtype, provenance, use_dtype
from lorasb.utils.atomic_files import write_json

IMPORTS = {
    "torch": "import torch",
    "torch and lorasb": "import torch, lorasb",
    "torch and peft": "import torch, peft",
    "torch and lorasb.patch": "import torch, lorasb; lorasb.patch",
}


def seconds_of(code: str) -> float:
    """Time a statement in a fresh process, without the start of the interpreter."""
    script = f"import time; started = time.perf_counter()\n{code}\nprint(time.perf_counter() - started)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


def imports(rounds: int) -> dict[str, list[float]]:
    """Seconds of each import, in turns; an untimed first round warms the file cache."""
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(rounds + 1):
        for name, code in IMPORTS.items():
            taken = seconds_of(code)
            if turn > 0:
                found[name].append(taken)
    return found


def smollm() -> Any:
    """The embedded model."""
    from transformers import AutoModelForCausalLM

    from lorasb.app.prepare import demo_model

    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=measured_dtype())


def mistral() -> Any:
    """A Mistral-7B without weights."""
    from transformers import AutoModelForCausalLM, MistralConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MistralConfig(), dtype=torch.bfloat16)


def patching(make: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of `lorasb.patch` on a fresh model."""
    import lorasb

    found = []
    for turn in range(rounds + 1):
        model = make()
        started = time.perf_counter()
        lorasb.patch(model)
        if turn > 0:
            found.append(time.perf_counter() - started)
    return found


def lines(rows: dict[str, list[float]]) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for name, values in rows.items():
        yield [name, f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder of startup-cpu.json")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    rows = {f"import {name}": values for name, values in imports(options.rounds).items()}
    rows["patch SmolLM2, 30 blocks"] = patching(smollm, 3)
    rows["patch Mistral-7B on the meta device"] = patching(mistral, 3)
    alone, stub, peft, patch = (statistics.median(rows[f"import {name}"]) for name in IMPORTS)
    ratios = stub / alone, patch / peft
    show("seconds, median (least - most)", ("what", "s"), lines(rows))
    print(f"lorasb over torch alone: {ratios[0]:.3f}x; lorasb.patch over peft alone: {ratios[1]:.3f}x")
    if options.output:
        found = {**provenance(), "ratio": ratios[0], "patch over peft": ratios[1], "seconds": rows}
        write_json(options.output / "startup-cpu.json", found)


if __name__ == "__main__":
    main()
