"""Speed and memory, each relative to a baseline in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.layers import suite_report
from benchmarks.quantized import table as four_bits_table
from benchmarks.research.reporting.markdown import committed_picture, picture, read_json, table, where
from benchmarks.serving import decoding, many_adapters, vllm
from benchmarks.training import initialization, opaque_bases, step

ORDINARY = "avx2"  # folder of results on a processor without bf16 products
INTRODUCTION = """\
`make bench` measures all of this on a CPU within twenty minutes. Ratios are ours over the baseline's unless a column
says otherwise, so below 1x is better. Each is the median over rounds in which all ways run in turn, which may differ
from the ratio of the medians next to it; ranges are from the 20th to the 80th percentile."""


def section(folder: Path) -> list[str]:
    """Return the section with every results file that exists."""
    out = ["## Speed and memory", "", INTRODUCTION, ""]
    of_models = starts, training_step, decoded, other_quantizers, many, in_vllm, startup
    parts = layers, four_bits, *of_models, ordinary, gpus
    for part in parts:
        out += [*part(folder), ""]
    return out


def layers(folder: Path) -> Iterator[str]:
    """A linear layer, and groups of siblings."""
    path = folder / "cpu.json"
    if not path.is_file():
        return
    machine, rows = suite_report.read([path])
    run = read_json(path)
    at = {"machine": machine, "date": run["datetime"][:10]} | (
        {"commit": run["commit_info"]["id"]} if run["commit_info"] else {}
    )
    yield from ("### A layer on a CPU", "", where(at), "", f"{suite_report.summary(rows)}.", "")
    chosen = [row for row in rows if row["direction"] == "forward+backward" and row["M"] == 512 and row["r"] == 96]
    head = ["in", "out", "dtype", "eager chain", "PEFT LoRA r=32", "ours", "kept for backward: PEFT / ours"]
    yield "Time of forward and backward, 512 tokens, r=96, relative to the linear without an adapter:"
    yield ""
    yield from table(head, (_layer(*case) for case in suite_report.by_case(chosen)), left=3)
    yield from picture("Forward and backward over the linear without an adapter, by shape", "cpu.png", "results")


def _layer(first: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    ours = found.get("ours, grouped", found["ours"])
    peft = next(row for name, row in found.items() if "LoRA" in name)
    ratios = [
        f"{row['ratio']:.3f}x ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})" for row in (found["chain"], peft, ours)
    ]
    kept = " / ".join(suite_report.size(row["saved_bytes"]) for row in (peft, ours))
    return [str(first["n"]), str(first["m"]), str(first["dtype"]), *ratios, kept]


def four_bits(folder: Path) -> Iterator[str]:
    """NF4 on a CPU."""
    if found := read_json(folder / "four-bits-cpu.json"):
        commits = ", ".join(sorted({row["commit"] for row in found["rows"]}))
        dates = ", ".join(sorted({row["date"] for row in found["rows"]}))
        yield from ("### 4-bit bases on a CPU", "", where({**found, "commit": commits, "date": dates}), "")
        yield from four_bits_table.table(found)
    if curve := read_json(folder / "four-bits-curve.json"):
        yield from ("", "Loss with a 16-bit and a 4-bit base, on the demo's task:", "", where(curve), "")
        head = ["bits", "seeds", "held-out loss before", "after", "exact answers after"]
        yield from table(head, (_bits(curve["runs"], bits) for bits in (16, 4)))


def _bits(runs: list[dict[str, Any]], bits: int) -> list[str]:
    mine = [run for run in runs if run["bits"] == bits]
    mean = {name: statistics.fmean(run[name] for run in mine) for name in mine[0] if name.startswith("eval_")}
    after = f"{mean['eval_accuracy_after']:.0%}"
    return [str(bits), str(len(mine)), f"{mean['eval_loss_before']:.3f}", f"{mean['eval_loss_after']:.3f}", after]


def starts(folder: Path) -> Iterator[str]:
    """Initialization."""
    if found := read_json(folder / "init-cpu.json"):
        yield from ("### Initialization on a CPU", "", where(found), "")
        size = (
            f"SmolLM2-135M, {initialization.SAMPLES} x {initialization.TOKENS} tokens, r={initialization.RANK}, fp32:"
        )
        yield from (size, "")
        yield from table(["", "layer by layer", "against", "ratio"], initialization.rows(found))
        yield from committed_picture("Energy of the first full step against rank", folder, "ranks.png")


def training_step(folder: Path) -> Iterator[str]:
    """A training step of an entire model."""
    if found := read_json(folder / "step-cpu.json"):
        what = f"SmolLM2-135M, {found['machine'].get('dtype', 'bf16')}, 4 x 128 tokens, AdamW:"
        yield from ("### A training step on a CPU", "", where(found), "", what, "")
        yield from table(list(step.HEAD), step.rows(found["ways"]))


def other_quantizers(folder: Path) -> Iterator[str]:
    """A training step with other quantizers' layers."""
    if found := read_json(folder / opaque_bases.FILE):
        yield from ("### A training step over other quantizers' layers, on a CPU", "", where(found), "")
        dtype = found["machine"].get("dtype", "bf16")
        yield f"SmolLM2-135M, {dtype}, 4 x 128 tokens, AdamW; {step.OURS} relative to {step.PEFT}:"
        yield ""
        lines = [[base, *opaque_bases.cells(ways)] for base, ways in found["bases"].items()]
        yield from table(["base", *opaque_bases.HEAD], lines)


def decoded(folder: Path) -> Iterator[str]:
    """Decoding with an adapter that is not merged."""
    if found := read_json(folder / decoding.FILE):
        yield from ("### Decoding with an adapter, on a CPU", "", where(found), "")
        yield f"SmolLM2-135M, {found['machine']['dtype']}; a step decodes one token of every row:"
        yield ""
        yield from table(list(decoding.HEAD), decoding.lines(found))


def many(folder: Path) -> Iterator[str]:
    """Adapters on one basis."""
    if found := read_json(folder / many_adapters.FILE):
        yield from ("### Many adapters on one basis, on a CPU", "", where(found), "")
        dtype = found["machine"].get("dtype", "bf16")
        yield f"SmolLM2-135M, {dtype}, r={many_adapters.RANK}; a step decodes one token of {many_adapters.ROWS} rows."
        yield "The last column is relative to one adapter in the same run (64 adapters in 4 bits: to one in 4 bits)."
        yield ""
        yield from table(list(many_adapters.HEAD), many_adapters.rows(found))
        for sentence in many_adapters.sentences(found):
            yield from ("", sentence)
        title = "Memory by number of adapters, and tokens per second"
        yield from committed_picture(title, folder, many_adapters.PICTURE)


def in_vllm(folder: Path) -> Iterator[str]:
    """The plugin against vLLM's own multi-LoRA."""
    if found := read_json(folder / vllm.FILE):
        yield from ("### Many adapters in vLLM, on a CPU", "", where(found), "")
        sizes = f"{vllm.ROWS} prompts of 8 tokens, {vllm.TOKENS} generated tokens each"
        yield f"SmolLM2-135M, r={vllm.RANK}; {sizes}; the engines run in turn. vLLM's CPU build"
        yield "gathers A and B for every token, which its GPU kernels do not, so the ratio to it holds on CPUs only."
        yield "The last column is the median of each round's own ratio, not the ratio of the two median speeds."
        yield ""
        yield from table(list(vllm.HEAD), vllm.rows(found))
        for sentence in vllm.sentences(found):
            yield from ("", sentence)


def ordinary(folder: Path) -> Iterator[str]:
    """Yield what was also measured on a processor without 16-bit products."""
    found = [
        line for part in (four_bits, starts, training_step, decoded, many) for line in (*part(folder / ORDINARY), "")
    ]
    if any(found):
        yield from ("### On a processor without bf16 products", "")
        yield from (f"#{line}" if line.startswith("### ") else line for line in found)


def startup(folder: Path) -> Iterator[str]:
    """Importing and patching."""
    if found := read_json(folder / "startup-cpu.json"):
        yield from ("### Import and patch", "", where(found), "")
        medians = ((name, f"{statistics.median(values):.2f} s") for name, values in found["seconds"].items())
        yield from table(["", "median"], medians)
        yield from (
            "",
            f"`import torch, lorasb` relative to `import torch`: {found['ratio']:.3f}x; the rest loads on first use.",
        )
        if (ratio := found.get("patch over peft")) is not None:
            yield f"With a first use (`lorasb.patch`), relative to `import torch, peft`: {ratio:.3f}x."


def gpus(folder: Path) -> Iterator[str]:
    """Cards that have been measured by `make bench-gpu`."""
    yield from ("### On a GPU", "")
    cards = 0
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        if run.get("machine_info", {}).get("device") == "cuda":
            machine, rows = suite_report.read([path])
            cards += 1
            yield from (f"{suite_report.place(machine)}: {suite_report.summary(rows)}.", "")
            yield from picture(
                f"Forward and backward over the linear without an adapter: {machine['gpu']}",
                f"{path.stem}.png",
                "results",
            )
    if not cards:
        yield (
            "No card has been measured yet. `make bench-gpu` runs the GPU tests and measures, in about eight minutes "
            "on any card, what this report and the documentation say about GPUs; `make bench-gpu-suite` measures the "
            "layers and sibling groups of Mistral-7B, Gemma-2 9B, Llama-3.2 3B and RoBERTa-large at 1 to 8192 tokens, "
            "r = 32, 64, 96. Until then there is a calculated roofline: `python -m benchmarks.kernels.roofline --gpu "
            "a6000`."
        )
        yield from committed_picture(
            "Calculated roofline: overhead over the linears without adapter, RTX A6000", folder, "roofline.png"
        )
