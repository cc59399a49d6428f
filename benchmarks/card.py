"""Measure every GPU figure of the documentation on the installed card.

    python -m benchmarks.card [--output benchmarks/results] [--seconds 3] [--minutes 8] [--only SECTION]

Each row is written to CARD.json as soon as it is measured; none starts after `--minutes`. A second run of the same
commit measures the sections that are missing, failed, or ran out of time; another commit starts over.
Times are milliseconds by CUDA events: medians with percentiles, and ratios to the section's first way in the same
round. What does not fit into the card's memory is left out, and the row says so.
`--tiny` tests this program: it runs all sections on a CPU in shapes too small to be meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.shapes import MODELS
from benchmarks.common.tables import show
from benchmarks.common.timing import Stats, commit, measure, measured_dtype, peak_bytes, provenance
from benchmarks.layers.variants import Forward, Problem, calls, check, variants
from benchmarks.quantized.ways import PEFT_RANK, with_peft
from benchmarks.quantized.ways import ours as adapted
from lorasb.backends.autotune import TMA_GEMMS
from lorasb.backends.triton import architecture
from lorasb.kernels import plan
from lorasb.utils.atomic_files import write_json
from lorasb.utils.reading import read_json

MODEL, RANK, TOKENS, DROPOUT = "mistral-7b", 96, 2048, 0.05
FEW = (1, 16, 64)  # tokens
DIRECTIONS = ("forward", "forward+backward")
NO_MEMORY = "out of memory: the card has too little for the rest of this section"
NO_TIME, FAILED = "out of time: rerun the same command for this section", "failed; rerun the same command to retry:"
# Llama-3.2-1B's sizes, with random weights: nothing is downloaded.
ONE_BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The device, seconds per case, and the factor by which shapes are divided."""

    device: str
    seconds: float
    divisor: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a training step."""
        return TOKENS // self.divisor

    @property
    def rank(self) -> int:
        """Rank of our adapters."""
        return RANK // min(self.divisor, 8)


def row(case: str, stats: dict[str, Stats], **others: Any) -> Row:
    """One measured case."""
    return {"case": case, "ways": {way: asdict(found) for way, found in stats.items()}} | others


def compared(run: Run, n: int, ms: tuple[int, ...], M: int, direction: str, drop: float = 0.0) -> dict[str, Stats]:
    """Measure layers that read the same x, in every way of `benchmarks.layers.variants` or, for dropout, three ways."""
    sizes = n // run.divisor, tuple(m // run.divisor for m in ms)
    problem = Problem(*sizes, run.rank, M, measured_dtype(run.device), run.device)
    ways: dict[str, Forward] = variants(problem)
    if drop:
        ways = _with_dropout(problem, ways, drop)
    else:
        ways["addmm, unsloth's order"] = lambda x: [_BaseFirst.apply(x, *parts) for parts in _parts(problem)]
        check(problem, ways)
    return measure(calls(problem, ways, direction), run.device, run.seconds)


class _BaseFirst(torch.autograd.Function):
    """The adapted linear in unsloth's order: base products first, then the adapter's are added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, core: Tensor, b: Tensor) -> Tensor:
        u, r = x @ a.t(), core.to(x.dtype)
        ctx.save_for_backward(u, weight, a, r, b)
        return (x @ weight.t()).addmm_(u @ r.t(), b.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, a, r, b = ctx.saved_tensors
        t = dy @ b
        return (dy @ weight).addmm_(t @ r, a), None, None, (t.t() @ u).float(), None


def _parts(p: Problem) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(p.weights, p.a, p.cores, p.b, strict=True)


def _with_dropout(p: Problem, ways: dict[str, Forward], drop: float) -> dict[str, Forward]:
    from torch.nn.functional import dropout, linear

    from lorasb.functional import lora_sb_linear

    (parts,) = _parts(p)

    def chain(x: Tensor) -> list[Tensor]:
        weight, a, core, b = parts
        return [linear(x, weight) + linear(linear(linear(dropout(x, drop), a), core.to(x.dtype)), b)]

    return {
        "bare": ways["bare"],
        "chain": chain,
        "ours": lambda x: [lora_sb_linear(x, *parts, dropout=drop)],
    }


def linears(run: Run) -> Iterator[Row]:
    """The seven linears of a block, each alone."""
    for group in MODELS[MODEL]:
        for name, m in zip(group.names, group.ms, strict=True):
            for direction in DIRECTIONS:
                stats = compared(run, group.n, (m,), run.tokens, direction)
                yield row(f"{name} {group.n} x {m}, {run.tokens} tokens, {direction}", stats)


def few_tokens(run: Run) -> Iterator[Row]:
    """One layer with as few tokens as in decoding."""
    for M in FEW:
        yield row(f"4096 x 4096, {M} tokens, forward", compared(run, 4096, (4096,), M, "forward"))


def groups(run: Run) -> Iterator[Row]:
    """q/k/v and gate/up, one by one and in one call."""
    for group in MODELS[MODEL]:
        if len(group.ms) > 1:
            for direction in DIRECTIONS:
                stats = compared(run, group.n, group.ms, run.tokens, direction)
                yield row(f"{'/'.join(group.names)}, {run.tokens} tokens, {direction}", stats)


def paths(run: Run) -> Iterator[Row]:
    """Each linear and group on every path, whichever the tables choose, by ordinary launches."""
    from lorasb.app.tune_kernels import OPS, run_of

    (arch, sms), least = architecture(torch.device(run.device)), 10 if run.device == "cuda" else 1
    dtype = plan.DTYPES[measured_dtype(run.device)]
    for n, ms in dict.fromkeys((g.n, ms) for g in MODELS[MODEL] for ms in (*((m,) for m in g.ms), g.ms)):
        parts = tuple(m // run.divisor for m in ms)
        for op in OPS:
            shape = plan.Shape(op, dtype, run.tokens, n // run.divisor, sum(parts), run.rank, len(parts))
            (call, _), chosen = run_of(shape, parts, run.device), plan.choice(shape, arch, sms)
            plans = {path: replace(chosen, path=path) for path in ("addmm", "fused")}
            if arch == "sm_90":
                plans["tma"] = replace(chosen, path="tma", gemm=TMA_GEMMS[0])

            def by(one: plan.LaunchPlan, call: Any = call) -> Callable[[int], Any]:
                return lambda _: call(one)

            ways = {path: by(one) for path, one in plans.items()}
            stats = measure(ways, run.device, run.seconds, least)
            yield row(f"{n} x {'/'.join(map(str, ms))}, {run.tokens} tokens, {op}", stats, chosen=chosen.path)


def with_dropout(run: Run) -> Iterator[Row]:
    """One layer with dropout."""
    for direction in DIRECTIONS:
        stats = compared(run, 4096, (4096,), run.tokens, direction, DROPOUT)
        yield row(f"4096 x 4096, dropout {DROPOUT}, {run.tokens} tokens, {direction}", stats)


def four_bits(run: Run) -> Iterator[Row]:
    """One NF4 layer: bitsandbytes without and with PEFT's LoRA, and ours over the same packed weight."""
    import bitsandbytes as bnb

    size, dtype = 4096 // run.divisor, measured_dtype(run.device)
    dense = nn.Linear(size, size, bias=False, dtype=dtype)

    def packed() -> Any:
        layer = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), quant_type="nf4", compress_statistics=False)
        return layer.to(run.device)

    ways = {
        "bitsandbytes": packed(),
        "bitsandbytes + PEFT LoRA r=32": with_peft(nn.Sequential(packed())).to(run.device),
        "ours": adapted(packed(), run.rank).to(run.device),
    }
    for M in (*FEW, run.tokens):
        x = torch.randn(M, size, dtype=dtype, device=run.device, requires_grad=True)

        def call(layer: Any, x: Tensor = x) -> Callable[[int], Any]:
            return lambda _: layer(x).sum().backward()

        timed = {name: call(layer) for name, layer in ways.items()}
        yield row(f"{size} x {size}, {M} tokens, forward+backward", measure(timed, run.device, run.seconds))


def _model(run: Run) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**(ONE_BILLION if run.divisor == 1 else TINY)))
    return model.to(run.device, measured_dtype(run.device))


def _batch(run: Run, model: Any) -> dict[str, Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (4, run.tokens // 4), device=run.device)
    return {"input_ids": ids, "labels": ids}


def training(run: Run) -> Iterator[Row]:
    """Initialization, and a training step of a model with a billion parameters, against PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    import lorasb

    lora = LoraConfig(r=PEFT_RANK, lora_alpha=PEFT_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft, mine = get_peft_model(_model(run), lora).train(), lorasb.patch(_model(run), r=run.rank)
    batch = _batch(run, mine)

    def start(_: int) -> Any:
        lorasb.initialize(mine, [batch] * 2, lr=1e-4, progress=False)

    def step(model: Any) -> Callable[[int], Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def once(_: int) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    yield row(
        "initialize, 8 samples",
        measure({"initialize": start}, run.device, 0.0, least=2),
        bytes=peak_bytes(start, run.device),
    )
    steps = {"PEFT LoRA r=32": step(peft), "ours": step(mine.train())}
    peaks = {name: peak_bytes(one, run.device) for name, one in steps.items()}
    stats = measure(steps, run.device, 4 * run.seconds, least=4)
    yield row(f"a step of 4 x {run.tokens // 4} tokens", stats, bytes=peaks)


def host(run: Run) -> Iterator[Row]:
    """CPU time of launches, with CUDA stubbed out."""
    command = [sys.executable, "-m", "benchmarks.kernels.host_time", "--json", "--calls", str(200 // run.divisor)]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.kernels.host_time failed: {done.stderr.strip().splitlines()[-1]}")
    yield {"case": "µs of one thread", "host": json.loads(done.stdout)["rows"]}


def measured(section: Callable[[Run], Iterator[Row]], run: Run, end: float) -> Iterator[Row]:
    """Yield a section's rows until memory or time runs out or an error occurs, which the last row then reports."""
    try:
        for one in section(run):
            yield one
            if time.monotonic() > end:
                yield {"case": NO_TIME}
                return
    except torch.OutOfMemoryError:
        yield {"case": NO_MEMORY}
    except Exception as error:  # e.g. a missing package or a wrong result: other sections are still measured
        yield {"case": f"{FAILED} {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    finally:
        if run.device == "cuda":
            torch.cuda.empty_cache()


BLOCK, NOT_RUN = "docs/kernels.md", "not yet run on a GPU"
# section -> its function, and the (file, text) pairs that its figures replace; a new table goes next to the text
SECTIONS: dict[str, tuple[Callable[[Run], Iterator[Row]], tuple[tuple[str, str], ...]]] = {
    "linears": (linears, ((BLOCK, "| eager chain |"), ("README.md", "Not yet benchmarked on a GPU"))),
    "paths": (
        paths,
        (
            (BLOCK, "| our thin pass + cuBLAS twice |"),
            (BLOCK, "| fused |"),
            (BLOCK, "| thin pass + cuBLAS, q/k/v and gate/up together |"),
            (BLOCK, "| fused, q/k/v and gate/up together |"),
            # replaced by the rules that `lorasb bench tune MODEL` writes
            ("kernels/fused/tables/ARCH.json", '"measured": false'),
        ),
    ),
    "few tokens": (few_tokens, ((BLOCK, "**No GPU has been measured yet**"),)),
    "groups": (groups, ((BLOCK, "| what the shipped tables choose |"), ("docs/comparison.md", NOT_RUN))),
    "dropout": (with_dropout, ((BLOCK, "**No GPU has been measured yet**"),)),
    "4 bits": (four_bits, (("docs/quantized.md", NOT_RUN),)),
    "training": (
        training,
        (
            ("docs/planner.md", "has not been compared with a GPU yet"),
            ("docs/initialization.md", NOT_RUN),
            ("benchmarks/research/reporting/speed.py", "No card has been measured yet."),
        ),
    ),
    "host": (host, (("docs/kernels-without-a-gpu.md", "With CUDA stubbed out"),)),
}


HEAD = ("case", "way", "ms (20th-80th percentile)", "ratio to the first")


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the lines of a section's table."""
    for one in rows:
        if one.keys() == {"case"}:
            yield [one["case"]]
        for way, s in one.get("ways", {}).items():
            times, ratio = f"{s['p50']:.3f} ({s['p20']:.3f}-{s['p80']:.3f})", f"{s['ratio']:.3f}"
            yield [one["case"], way, times, ratio]
        for way, found in one.get("host", {}).items():
            yield [one["case"], way, f"{found['us']:.0f} µs", f"{found['ratio']:.2f}"]


def main() -> None:
    """Measure the missing sections; print and write each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of CARD.json")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement starts after this time")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="measure only these, even if complete")
    parser.add_argument("--tiny", action="store_true", help="test this program on a CPU, in tiny shapes")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        raise SystemExit("benchmarks.card needs a CUDA GPU: use make bench on a CPU, or --tiny to test this program")
    run = Run("cpu", 0.01, 32) if options.tiny else Run("cuda", options.seconds)
    name = "tiny" if options.tiny else torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.output / f"{name}.json"
    found = read_json(path) if path.is_file() else {}
    if found.get("commit") != commit():
        found = provenance(run.device) | {"sections": {}}
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    arch = plan.family(architecture(torch.device(run.device))[0])  # the family that has a table
    end = time.monotonic() + 60 * options.minutes
    for section, (measure_section, places) in SECTIONS.items():
        if options.only and section not in options.only:
            continue
        places = tuple((file.replace("ARCH", arch), text) for file, text in places)
        if not found["sections"].get(section, {}).get("complete") or options.only:
            if time.monotonic() > end:
                again = "" if options.only else "; the same command measures what is left"
                print(f"{section}: not begun, as {options.minutes:g} minutes are over{again}")
                continue
            found["sections"][section] = kept = {"replaces": places, "rows": (rows := []), "complete": False}
            for one in measured(measure_section, run, end):
                rows.append(one)
                write_json(path, found)
            kept["complete"] = not any(row["case"].startswith((NO_TIME, FAILED)) for row in rows)
            write_json(path, found)
        show(section, HEAD, lines(found["sections"][section]["rows"]), left=2)
        print(*(f"replaces {text!r} in {file}" for file, text in places), "", sep="\n")
    failed = [name for name, kept in found["sections"].items() if any(FAILED in row["case"] for row in kept["rows"])]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command measures them again")


if __name__ == "__main__":
    main()
