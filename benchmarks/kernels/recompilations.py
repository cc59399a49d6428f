"""Count the kernels that a block of Mistral-7B compiles for 1 to 32768 tokens, without compiling them.

    python -m benchmarks.kernels.recompilations [--arch sm_86] [--json]

Triton compiles a kernel again for every set of constants, and whenever another set of its integers is divisible by 16.
Each compilation takes a few seconds, in the middle of training.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.common.tables import show
from benchmarks.kernels.launches import plan_for, record
from benchmarks.kernels.static_report import ARCHS, launch_key

RANK = 96
SIBLINGS = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))  # (in, outs)
TOKENS = sorted(
    {*range(1, 33), *(2**i + d for i in range(5, 16) for d in (-1, 0, 1, 2**i // 2)), 100, 700, 6000, 20000}
)


def count(arch: str) -> dict[str, int]:
    """Return how many versions the tokens need, by kernel and direction."""
    keys: dict[str, set[str]] = {}
    for M in TOKENS:
        for n, ms in SIBLINGS:
            for op in ("forward", "backward"):
                plan = plan_for(op, torch.bfloat16, M, n, ms, RANK, arch, ARCHS[arch].sms)
                for launch in record(op, plan, torch.bfloat16, M, n, ms, RANK):
                    keys.setdefault(f"{launch.name}, {op}", set()).add(launch_key(launch))
    return {name: len(versions) for name, versions in keys.items()}


def main() -> None:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(ARCHS), action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    counted = {arch: count(arch) for arch in options.arch or ARCHS}
    if options.json:
        print(json.dumps(counted, indent=1))
        return
    names = sorted({name for kernels in counted.values() for name in kernels})
    lines = [[name, *(str(kernels.get(name, 0)) for kernels in counted.values())] for name in names]
    lines.append(["all", *(str(sum(kernels.values())) for kernels in counted.values())])
    show(f"Kernels compiled for a block of Mistral-7B, r={RANK}, bf16, 1 to 32768 tokens", ("", *counted), lines)


if __name__ == "__main__":
    main()
