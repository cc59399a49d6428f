"""Initialization of SmolLM2-135M: time and memory against keeping all sums, and against a LoRA training step.

    python -m benchmarks.training.initialization [--rounds 5] [--output benchmarks/results]

Memory is what a process needs on top of the loaded model. Times and memory are measured in turns, each in a fresh
process, as in real use. Unless a row says otherwise, models are in fp32 and a batch is one sample of 192 tokens of
generated problems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_name, dtype_option, provenance, use_dtype
from lorasb.utils.atomic_files import write_json

TOKENS, SAMPLES, RANK, LORA_RANK = 192, 8, 64, 32
DEMO_STEPS, DEMO_BATCH = 63, 16
ALL_SUMS = {"strategy": "accumulate", "memory_budget": "1000GB"}
LAYERWISE = {"strategy": "layerwise"}
PER_SAMPLE = LAYERWISE | {"update": "per-sample"}
PAPER_BATCHES = (1, 6)  # arithmetic and commonsense reasoning, table 8
KEEP = 3  # blocks whose energies are compared with the exact SVD's


def model(dtype: torch.dtype = torch.float32, blocks: int | None = None) -> Any:
    """SmolLM2-135M, or its first blocks."""
    from transformers import AutoModelForCausalLM

    from lorasb.app.prepare import demo_model

    found: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype)
    if blocks is not None:
        found.model.layers = found.model.layers[:blocks]
    return found


def samples(count: int = SAMPLES, rows: int = 1) -> list[dict[str, Tensor]]:
    """Join generated problems and their answers, and cut the text into batches of samples of 192 tokens."""
    from transformers import AutoTokenizer

    from lorasb.app.data import generate
    from lorasb.app.prepare import demo_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    examples = generate("word_sequence_reversal", 8 * count * rows, 0)
    text = "\n".join(f"{example.prompt} {example.completion}" for example in examples)
    ids = torch.tensor(tokenizer(text)["input_ids"][: count * rows * TOKENS]).view(count, rows, TOKENS)
    return [{"input_ids": part, "labels": part.clone(), "attention_mask": torch.ones_like(part)} for part in ids]


def initialize(found: Any, batches: list[dict[str, Tensor]], **options: Any) -> Any:
    """Initialize a patched model."""
    import lorasb

    return lorasb.initialize(found, batches, lr=1e-3, **{"progress": False} | options)


def patched(dtype: torch.dtype = torch.float32, blocks: int | None = None) -> Any:
    """The model with an adapter on every linear."""
    import lorasb

    return lorasb.patch(model(dtype, blocks), r=RANK)


def new_memory(call: Callable[[], Any]) -> int:
    """Peak bytes of resident memory that a call adds."""
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(peak[0], _resident()) - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def init_memory(blocks: int, **options: Any) -> dict[str, Any]:
    """Measure the memory that an initialization adds."""
    found, batches = patched(blocks=blocks), samples()
    with torch.no_grad():
        found(input_ids=batches[0]["input_ids"])
    return {"bytes": new_memory(lambda: initialize(found, batches, **options))}


def train_memory(rows: int) -> dict[str, Any]:
    """Measure the memory that an AdamW step with PEFT's LoRA on every linear adds."""
    import peft

    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    found, (batch,) = peft.get_peft_model(model(), config), samples(1, rows)
    optimizer = torch.optim.AdamW((p for p in found.parameters() if p.requires_grad), lr=1e-4)
    with torch.no_grad():
        found(input_ids=batch["input_ids"][:1])

    def step() -> None:
        found(**batch).loss.backward()
        optimizer.step()

    return {"bytes": new_memory(step)}


def init_time(**options: Any) -> dict[str, Any]:
    """Time an initialization, the first in its process as in real use; the model has run once before."""
    found, batches = patched(), samples()
    with torch.no_grad():
        found(**batches[0])
    started = time.perf_counter()
    initialize(found, batches, **options)
    return {"seconds": time.perf_counter() - started}


def epoch_share(steps: int = 20) -> dict[str, Any]:
    """Time the demo's initialization, and its training per sample: batches of 16, sequences of the demo's lengths."""
    import lorasb
    from lorasb.app.prepare import prepare
    from lorasb.app.settings import Settings
    from lorasb.app.tokenize import Collator, encode

    run = prepare(Settings(eval_examples=1, train_examples=64 + 16 * steps, dtype=dtype_name(), template="none"))
    run.model = lorasb.patch(run.model, r=RANK)
    encoded = [encode(example, run.tokenizer, 512) for example in run.train]
    collate = Collator(run.tokenizer.pad_token_id, run.model)
    batches = [collate(encoded[i : i + 16]) for i in range(0, len(encoded), 16)]
    started = time.perf_counter()
    initialize(run.model, batches[:4])
    init_seconds = time.perf_counter() - started
    optimizer = torch.optim.AdamW((p for p in run.model.parameters() if p.requires_grad), lr=2e-3)
    run.model.train()
    seconds = []
    for batch in batches[4:]:
        started = time.perf_counter()
        run.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append((time.perf_counter() - started) / 16)
    tokens = sum(map(len, encoded)) / len(encoded)
    return {
        "init_seconds": init_seconds,
        "seconds_a_sample": seconds,
        "tokens_a_sample": tokens,
        "dtype": run.precision.name,
    }


def bits_and_energies() -> dict[str, Any]:
    """Size of all signs against the gradients in fp32; energy of the randomized SVD against the exact one."""
    from lorasb.init.cache import read
    from lorasb.init.svd import truncated_svd

    found = patched()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signs.safetensors"
        initialize(found, samples(), cache=path)
        layers, size = read(path)[0], path.stat().st_size
    dense = sum(4 * layer.bits.shape[0] * layer.bits.shape[1] for layer in layers.values())
    words = sum(4 * layer.bits.words.numel() for layer in layers.values())
    planes = sum(4 * layer.bits.nonzero.numel() for layer in layers.values() if layer.bits.nonzero is not None)
    chosen = [name for name in layers if int(name.split(".")[2]) in (0, 15, 29)[:KEEP]]
    shares = []
    for name in chosen:
        signs = layers[name].bits.unpack(torch.float64)
        u, _, vt = truncated_svd(layers[name].bits, RANK, seed=0)
        inside = (u.double().t() @ signs @ vt.double().t()).square().sum()
        shares.append(float(inside / torch.linalg.svdvals(signs)[:RANK].square().sum()))
    return {
        "dense_bytes": dense,
        "words_bytes": words,
        "zero_plane_bytes": planes,
        "file_bytes": size,
        "energy_of_optimum": shares,
    }


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "layerwise, 30 blocks": lambda: init_memory(30, **LAYERWISE),
    "layerwise, 2 blocks": lambda: init_memory(2, **LAYERWISE),
    "all sums, 30 blocks": lambda: init_memory(30, **ALL_SUMS),
    "per-sample, 30 blocks": lambda: init_memory(30, **PER_SAMPLE),
    **{f"LoRA step of {rows}": lambda rows=rows: train_memory(rows) for rows in PAPER_BATCHES},
    "seconds, layerwise": lambda: init_time(**LAYERWISE),
    "seconds, all sums": lambda: init_time(**ALL_SUMS),
    "seconds, per-sample": lambda: init_time(**PER_SAMPLE),
    "epoch": epoch_share,
    "bits": bits_and_energies,
}


MEMORY = tuple(name for name in WORKERS if "blocks" in name or "step" in name)


def measure(name: str) -> dict[str, Any]:
    """Run a worker in a fresh process; to measure memory, set its malloc to return freed memory at once."""
    command = [sys.executable, "-m", "benchmarks.training.initialization", "--worker", name]
    limits = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"} if name in MEMORY else {}
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the worker {name!r} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def collect(rounds: int) -> dict[str, Any]:
    """Measure times and memory several times each, in turns."""
    memory: dict[str, list[int]] = {name: [] for name in MEMORY}
    times: dict[str, list[float]] = {"layerwise": [], "all sums": [], "per-sample": []}
    for i in range(rounds):
        for name in list(times)[:: 1 if i % 2 else -1]:
            times[name].append(measure(f"seconds, {name}")["seconds"])
    for _ in range(min(3, rounds)):
        for name in MEMORY:
            memory[name].append(measure(name)["bytes"])
    return {"memory": memory, "times": times, "epoch": measure("epoch"), "bits": measure("bits")}


def boundary_growth() -> int:
    """Bytes of the inputs of 28 more blocks."""
    return 28 * SAMPLES * TOKENS * 576 * 4


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the table: figure, ours, the peer's, ratio."""
    memory = {name: statistics.median(values) for name, values in found["memory"].items()}
    ours, sums = memory["layerwise, 30 blocks"], memory["all sums, 30 blocks"]
    a_sample = statistics.median(found["epoch"]["seconds_a_sample"])
    training, init = a_sample * DEMO_STEPS * DEMO_BATCH, found["epoch"]["init_seconds"]
    grown, bits = memory["layerwise, 2 blocks"] + boundary_growth(), found["bits"]
    return [
        _time_row("time, s", found["times"], "layerwise", "all sums", "all sums kept"),
        ("new memory, MB", _mb(ours), f"all sums kept: {_mb(sums)}", f"{ours / sums:.2f}x"),
        *_per_sample(found["times"], memory),
        ("new memory of 30 blocks, MB", _mb(ours), f"of 2, and 28 boundaries: {_mb(grown)}", f"{ours / grown:.2f}x"),
        *(
            (
                f"new memory, MB (step of {rows} x {TOKENS} tokens)",
                _mb(ours),
                f"PEFT LoRA r={LORA_RANK}, AdamW: {_mb(memory[f'LoRA step of {rows}'])}",
                f"{ours / memory[f'LoRA step of {rows}']:.2f}x",
            )
            for rows in PAPER_BATCHES
        ),
        (
            f"the demo's model and data, s (64 samples, {found['epoch'].get('dtype', 'bf16')})",
            f"{init:.1f}",
            f"{DEMO_STEPS} steps of {DEMO_BATCH} at {found['epoch']['tokens_a_sample'] / a_sample:.0f} tokens/s: "
            f"{training:.0f}",
            f"{init / training:.2f}x",
        ),
        (
            "signs of all layers, MB",
            f"{bits['words_bytes'] / 1e6:.1f}",
            f"gradients in fp32: {bits['dense_bytes'] / 1e6:.1f} "
            f"(planes of zeros: {bits['zero_plane_bytes'] / 1e6:.1f})",
            f"1/{bits['dense_bytes'] / bits['words_bytes']:.1f}",
        ),
        (
            f"energy of sign(G) at r={RANK}, least of {len(bits['energy_of_optimum'])} layers",
            "randomized, from bits",
            "exact SVD",
            f"{min(bits['energy_of_optimum']):.3%}",
        ),
    ]


def _time_row(what: str, times: dict[str, list[float]], ours: str, other: str, shown: str) -> tuple[str, str, str, str]:
    """Medians, and ratios within a round."""
    ratios = [a / b for a, b in zip(times[ours], times[other], strict=True)]
    mine, theirs = (statistics.median(times[name]) for name in (ours, other))
    spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
    return what, f"{mine:.1f}", f"{shown}: {theirs:.1f}", spread


def _per_sample(times: dict[str, list[float]], memory: dict[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows that compare the cost of per-sample with the default's, if it was measured."""
    if "per-sample" in times:
        mine, theirs = memory["per-sample, 30 blocks"], memory["layerwise, 30 blocks"]
        yield _time_row('update="per-sample": time, s', times, "per-sample", "layerwise", 'update="adamw"')
        yield (
            'update="per-sample": new memory, MB',
            _mb(mine),
            f'update="adamw": {_mb(theirs)}',
            f"{mine / theirs:.2f}x",
        )


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for init-cpu.json")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    warnings.simplefilter("ignore")
    if options.worker:
        print(json.dumps(WORKERS[options.worker]()))
        return
    found = {**provenance(dtype="float32"), **collect(options.rounds)}
    if options.output:
        write_json(options.output / "init-cpu.json", found)
    where = found["machine"]
    print(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}")
    title = f"Initialization of SmolLM2-135M, {SAMPLES} x {TOKENS} tokens, r={RANK}, fp32"
    show(title, ("", "layer by layer", "against", "ratio"), rows(found), left=4, width=150)


if __name__ == "__main__":
    main()
