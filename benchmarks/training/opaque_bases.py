"""A training step over bases of other quantizers: LoRA-SB r=96 against PEFT's LoRA r=32, in turns in one run.

    python -m benchmarks.training.opaque_bases [--base hqq ...] [--seconds 40] [--output benchmarks/results]

SmolLM2-135M, 4 x 128 tokens, AdamW, all linear layers; --dtype is auto. Both adapters are added to the same layers,
which compute the base product themselves. Memory: a step's peak beyond the model and the optimizer's state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.tables import show
from benchmarks.common.timing import (
    dtype_name,
    dtype_option,
    measure,
    measured_dtype,
    peak_bytes,
    provenance,
    use_dtype,
)
from benchmarks.training.step import OURS, PEFT, Training
from lorasb.utils.atomic_files import write_json

FILE = "opaque-bases-cpu.json"
HEAD = ("PEFT", "LoRA-SB", "time (p20 to p80)", "PEFT, peak", "LoRA-SB, peak", "peak")
GROUP = 64  # weights that share a scale, in formats that have groups


def torchao_int8(model: Any) -> Any:
    """torchao's int8 weights, one scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def torchao_int4(model: Any) -> Any:
    """torchao's int4 weights, which a CPU dequantizes in every call."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    quantize_(model.model, config)
    return model


def hqq(model: Any) -> Any:
    """HQQ in 4 bits, on its PyTorch backend."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
            model.model.set_submodule(name, HQQLinear(layer, config, compute_dtype=measured_dtype(), device="cpu"))
    return model


def quanto(model: Any) -> Any:
    """optimum-quanto's int8 weights."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(model.model, weights=qint8)
    freeze(model.model)
    return model


BASES: dict[str, Callable[[Any], Any]] = {
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "hqq": hqq,
    "quanto": quanto,
}


def run(base: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Measure both ways on one base."""
    ways = {way: Training(way, BASES[base]) for way in (PEFT, OURS)}
    stats = measure(dict(ways), "cpu", seconds, least=6)
    return {way: {**asdict(stats[way]), "peak_bytes": peak_bytes(one, "cpu")} for way, one in ways.items()}


def cells(ways: dict[str, dict[str, Any]]) -> list[str]:
    """A base's table row."""
    theirs, ours = ways[PEFT], ways[OURS]
    times = f"{theirs['p50']:.0f} ms", f"{ours['p50']:.0f} ms"
    ratio = f"{ours['ratio']:.2f}x ({ours['ratio_p20']:.2f} to {ours['ratio_p80']:.2f})"
    peaks = (f"{one['peak_bytes'] / 1e6:.0f} MB" for one in (theirs, ours))
    return [*times, ratio, *peaks, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}x"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--seconds", type=float, default=40.0, help="for each base")
    parser.add_argument("--output", type=Path, help=f"folder of {FILE}")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    torch.manual_seed(0)
    found = {base: run(base, options.seconds) for base in options.base}
    title = f"a training step of SmolLM2-135M on other quantizers' layers, {dtype_name()}, 4 x 128 tokens"
    show(title, ("base", *HEAD), ([base, *cells(ways)] for base, ways in found.items()))
    if options.output:
        write_json(options.output / FILE, {**provenance(), "bases": found})


if __name__ == "__main__":
    main()
