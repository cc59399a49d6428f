"""Decoding with sixty-four adapters in one batch against one; memory and time that adapters take.

    python -m benchmarks.serving.many_adapters [--seconds 60] [--output benchmarks/results]

SmolLM2-135M, all linear layers, LoRA-SB r=64 on one basis and PEFT's LoRA r=32; --dtype is auto. A step decodes one
token in each of 64 rows, after a prompt of 16 tokens; adapter names are set once for all steps, as in generation.
Adapter files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lorasb
from benchmarks.common.tables import show
from benchmarks.common.timing import dtype_name, dtype_option, measure, measured_dtype, provenance, use_dtype
from benchmarks.serving.decoding_steps import ROWS, Steps
from benchmarks.serving.picture import draw
from lorasb.app.prepare import demo_model
from lorasb.utils.atomic_files import write_json

FILE, PICTURE = "many-adapters-cpu.json", "many-adapters.png"
RANK, PEFT_RANK, MANY = 64, 32, 1000
ONE, BATCH, OF_MANY, PEFT = "one adapter", "64 adapters", "64 of 1000 adapters", "PEFT LoRA r=32, 64 adapters"
TRAINED, TOKENS = 16, (16, 128)  # adapters, and tokens per row
APART, TOGETHER, ALONE = "one after the other", "in one batch", "one adapter, the same batch"
ONE_4BIT, BATCH_4BIT = "4 bits, one adapter", "4 bits, 64 adapters"
HEAD = ("", "step (p20 to p80)", "tokens/s", "time, over one adapter's")


def base() -> Any:
    """The embedded model."""
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=measured_dtype()).eval()


def ours(four_bits: bool = False) -> Any:
    """The base with a basis whose R is not zero."""
    model = base()
    model = lorasb.patch(lorasb.quantize(model) if four_bits else model, r=RANK, init="random").eval()
    for name, parameter in model.named_parameters():
        if "lorasb_R" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def theirs(count: int) -> Any:
    """The base with `count` of PEFT's LoRAs."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=PEFT_RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name="user-0").eval()
    for i in range(1, count):
        model.add_adapter(f"user-{i}", config)
    return model


def random_cores(bank: lorasb.AdapterBank, seed: int) -> dict[str, torch.Tensor]:
    """Draw an adapter's R matrices, by layer."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(c.r, c.r, generator=g) * 0.01 for name, c in bank.columns.items()}


def users(count: int) -> list[str]:
    """Names of adapters."""
    return [f"user-{i}" for i in range(count)]


def decoding(seconds: float) -> dict[str, Any]:
    """Times of a step, in turns."""
    model, quantized = ours(), ours(four_bits=True)
    bank, bank_4bit = (lorasb.AdapterBank(one, dtype=torch.bfloat16) for one in (model, quantized))
    for i, name in enumerate(users(ROWS)):
        bank.add(name, random_cores(bank, i))
        bank_4bit.add(name, random_cores(bank_4bit, i))
    peft_model = theirs(ROWS)
    ways = {
        ONE: Steps(model, None),
        BATCH: Steps(model, users(ROWS)),
        PEFT: Steps(peft_model, users(ROWS)),
        ONE_4BIT: Steps(quantized, None),
        BATCH_4BIT: Steps(quantized, users(ROWS)),
    }
    found = {name: asdict(stats) for name, stats in measure(dict(ways), "cpu", seconds, least=8).items()}
    del peft_model, ways[PEFT], quantized
    for i in range(ROWS, MANY):
        bank.add(f"user-{i}", random_cores(bank, i % ROWS))
    spread = [f"user-{i * (MANY // ROWS)}" for i in range(ROWS)]
    again = measure({ONE: ways[ONE], OF_MANY: Steps(model, spread)}, "cpu", seconds / 3, least=8)
    return found | {OF_MANY: asdict(again[OF_MANY])}


class Training:
    """An AdamW step of several adapters with a row each: in one batch, row by row, or with one adapter for all rows."""

    def __init__(self, model: Any, way: str, tokens: int) -> None:
        self.model, self.way = model.train(), way
        self.names = [users(1)[0]] * TRAINED if way == ALONE else users(TRAINED)
        self.groups = lorasb.adapter_parameter_groups(model, users(TRAINED), 1e-4)
        self.optimizer = torch.optim.AdamW(self.groups)
        self.ids = torch.randint(3, 49000, (TRAINED, tokens), generator=torch.Generator().manual_seed(0))

    def _step(self, rows: slice) -> None:
        self.optimizer.zero_grad()
        names, ids = self.names[rows], self.ids[rows]
        logits = self.model(input_ids=ids, adapter_names=names).logits
        torch.stack(list(lorasb.adapter_losses(logits, ids, names).values())).sum().backward()
        self.optimizer.step()

    def __call__(self, _: int) -> None:
        for i in range(TRAINED) if self.way == APART else ():
            self._step(slice(i, i + 1))
        if self.way != APART:
            self._step(slice(TRAINED))


def training(seconds: float) -> dict[str, Any]:
    """Times of a step of sixteen adapters, in turns, by the number of tokens."""
    model = ours()
    for name in users(TRAINED):
        model.add_adapter(name, lorasb.LoRASBConfig(basis="default"))
    found = {}
    for tokens in TOKENS:
        ways = {way: Training(model, way, tokens) for way in (APART, TOGETHER, ALONE)}
        stats = measure(dict(ways), "cpu", seconds / len(TOKENS), least=4)
        found[str(tokens)] = {name: asdict(one) for name, one in stats.items()}
    return found


def costs() -> dict[str, float]:
    """Bytes of an adapter, and times to load, add and remove one."""
    model = ours()
    bank = lorasb.AdapterBank(model)
    model.add_adapter("user", lorasb.LoRASBConfig(basis="default"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["user"])
        for i in range(MANY):
            _linked(Path(folder, "user"), Path(folder, "all", f"user-{i}"))
        start = time.perf_counter()
        report = bank.load(Path(folder, "all"))
        loading = time.perf_counter() - start
    assert len(report.loaded) == MANY, report.failed
    cores = random_cores(bank, 0)
    bank.remove("user-0")
    adding, removing = [], []
    for _ in range(50):
        start = time.perf_counter()
        bank.add("new", cores)
        adding.append(time.perf_counter() - start)
        start = time.perf_counter()
        bank.remove("new")
        removing.append(time.perf_counter() - start)
    numbers = sum(c.r**2 for c in bank.columns.values())
    lora = sum(PEFT_RANK * (layer.in_features + layer.out_features) for layer in bank.layers.values())
    return {
        "lora_bytes": 4 * lora,  # PEFT keeps its factors in fp32
        "adapter_bytes": bank.storage.nbytes / len(bank.storage),
        "bytes_of_its_numbers": numbers * bank.storage.element_size(),
        "load_seconds": loading,
        "add_ms": 1e3 * sorted(adding)[25],
        "remove_ms": 1e3 * sorted(removing)[25],
    }


def _linked(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, target / file.name)


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table's rows, for the screen and the report."""
    times = found["decoding"]
    for name, one in times.items():
        ratio = one["p50"] / times[ONE_4BIT]["p50"] if name == BATCH_4BIT else one["ratio"]  # from the same run
        step = one["p50"] / Steps.COUNT
        spread = f"{step:.0f} ms ({one['p20'] / Steps.COUNT:.0f} to {one['p80'] / Steps.COUNT:.0f})"
        yield [name, spread, f"{1e3 * ROWS / step:.0f}", f"{ratio:.2f}x"]


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """Yield sentences on what an adapter costs."""
    cost = found["costs"]
    yield (
        f"An adapter in fp32 takes {cost['adapter_bytes'] / 1e6:.2f} MB, "
        f"{cost['adapter_bytes'] / cost['bytes_of_its_numbers']:.3f} of its numbers' bytes; {MANY} are loaded in "
        f"{cost['load_seconds']:.1f} s, one is added in {cost['add_ms']:.2f} ms and removed in "
        f"{cost['remove_ms']:.3f} ms."
    )
    for tokens, times in found["training"].items():
        apart, together, alone = (times[name]["p50"] for name in (APART, TOGETHER, ALONE))
        yield (
            f"A training step of {TRAINED} adapters, {tokens} tokens of each, takes {together:.0f} ms in one batch, "
            f"{together / apart:.2f}x the {apart:.0f} ms that they take one after the other; the same batch of one "
            f"adapter takes {alone:.0f} ms."
        )


def draw_found(found: dict[str, Any], path: Path) -> None:
    """Draw the measurements."""
    times = found["decoding"]
    # from ratios, as OF_MANY was measured against ONE in another run
    one = 1e3 * ROWS * Steps.COUNT / times[ONE]["p50"]
    tokens = {name: one / times[name]["ratio"] for name in (PEFT, BATCH, OF_MANY, ONE)}
    draw(tokens, path)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for decoding")
    parser.add_argument("--output", type=Path, help=f"folder of {FILE}")
    dtype_option(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    torch.manual_seed(0)
    found = {
        "costs": costs(),
        "training": training(options.seconds / 2),
        "decoding": decoding(options.seconds),
    }
    show(f"decoding {ROWS} rows with SmolLM2-135M, {dtype_name()}", HEAD, rows(found))
    print(*sentences(found), sep="\n")
    if options.output:
        write_json(options.output / FILE, {**provenance(), **found})
        draw_found(found, options.output / PICTURE)


if __name__ == "__main__":
    main()
