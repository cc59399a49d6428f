"""Many adapters in vLLM: the plugin against vLLM's own multi-LoRA with the exported adapters, and the bare model.

    python -m benchmarks.serving.vllm --vllm .venv/vllm-0.32/bin/python [--seconds 60] [--output benchmarks/results]

SmolLM2-135M, r = 64 on all linears, 64 rows of 8 prompt and 16 generated tokens, greedy. Three engines, each in its own
process, answer in turns. Also measured: what a trainer sends after a step (R, the plain LoRA, or merged weights,
written and loaded), and how many adapters an engine holds in 8 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorasb
from benchmarks.common.tables import show
from benchmarks.common.timing import Call, dtype_name, dtype_option, measure, measured_dtype, provenance, use_dtype
from lorasb.constants import CONFIG_NAME, WEIGHTS_NAME
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis import add_adapters, save_adapters
from lorasb.training.vllm_sampler import VLLMSampler
from lorasb.utils.atomic_files import write_json

FILE = "vllm-cpu.json"
RANK, ROWS, TOKENS, MANY = 64, 64, 16, 1000
MEMORY = 8 << 30  # bytes that an engine may allocate when its adapters are counted
COUNTS = (1, 16, 64)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BARE, PLUGIN, STOCK = "bare model", "plugin", "vLLM's multi-LoRA"
# Merged weights are only written: vLLM's CPU build packs its weights and cannot load others.
SYNCS = ("R alone", "plain LoRA", "merged weights (not loaded)")
HEAD = ("64 rows", "tokens/s (p20 to p80)", "time, over the bare model's")


class Engine:
    """A vLLM engine in a subprocess."""

    def __init__(self, python: str, slots: int, basis: Path | None = None, memory: int = 0) -> None:
        options = {"model": lorasb.demo_model(), "dtype": dtype_name(), "rows": ROWS, "slots": slots, "memory": memory}
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "LORASB_BASIS": str(basis or "")}
        # -I: otherwise this module, in the script's folder, would be imported as vllm
        script = str(Path(__file__).with_name("vllm_engine.py"))
        self.process = subprocess.Popen(
            [python, "-I", script, json.dumps(options | {"modules": MODULES})],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.started = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        raise RuntimeError("the engine ended: run benchmarks/serving/vllm_engine.py by hand to see why")

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, and return the answer."""
        assert self.process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def people(folder: Path) -> Any:
    """Save 64 adapters of random R on a basis, export one as a plain LoRA, and link both to a thousand names."""
    model = lorasb.patch(AutoModelForCausalLM.from_pretrained(lorasb.demo_model()), r=RANK, init="random")
    names = [f"user{i}" for i in range(ROWS)]
    add_adapters(model, names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers_with(model, "default").values():
            for name in names:
                layer.lorasb_R[name].copy_(torch.randn(RANK, RANK, generator=generator) * 0.01)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    save_adapters(model, folder, names)
    first = folder / "plain" / "user0"
    lorasb.export_lora(model, str(first), adapter_name="user0", dtype=measured_dtype(), quiet=True)
    link(folder, MANY)
    return model


def link(folder: Path, count: int) -> list[str]:
    """Link the adapters to `count` names, and return these: an adapter's cost does not depend on its values."""
    names = [f"user{i}" for i in range(count)]
    for i, name in enumerate(names):
        for path, target in ((folder, f"user{i % ROWS}"), (folder / "plain", "user0")):
            if not (path / name).exists():
                (path / name).symlink_to(path / target)
    return names


def speed(engines: dict[str, Engine], seconds: float) -> dict[str, Any]:
    """Time generation, in turns."""

    def run(way: str, count: int, _: int) -> None:
        names = [f"user{i % count}" for i in range(ROWS)] if count else [None] * ROWS
        engines[way]("run", names=names, tokens=TOKENS)

    found: dict[str, Any] = {}
    # separately: a round of vLLM's multi-LoRA takes as long as ten of the others
    for way, least in ((PLUGIN, 7), (STOCK, 3)):
        ways: dict[str, Call] = {BARE: partial(run, BARE, 0)}
        ways |= {way_title(way, count): partial(run, way, count) for count in COUNTS}
        found |= {name: asdict(one) for name, one in measure(ways, "cpu", seconds, least).items() if name not in found}
    return found


def way_title(way: str, count: int) -> str:
    return f"{way}, {count} adapter{'s' if count > 1 else ''}"


def syncing(model: Any, engines: dict[str, Engine], folder: Path) -> dict[str, Any]:
    """Measure bytes and milliseconds of what a trainer sends after a step: written to a RAM disk, and loaded."""
    plugin, stock = engines[PLUGIN], engines[STOCK]
    sampler = VLLMSampler("http://127.0.0.1:0", folder=folder / "policy")
    sent: list[float] = []
    sampler._load = lambda path: sent.append(plugin("replace", path=str(path))["ms"])  # type: ignore[method-assign]
    times: dict[str, list[float]] = {name: [] for name in SYNCS}
    sizes: dict[str, int] = {}
    for step in range(7):
        start = time.perf_counter()
        sizes[SYNCS[0]] = sampler.sync(model, "default").bytes
        times[SYNCS[0]].append(1e3 * (time.perf_counter() - start))
        path = folder / "plain" / f"step{step}"
        start = time.perf_counter()
        lorasb.export_lora(model, str(path), dtype=measured_dtype(), quiet=True)
        stock("replace", path=str(path))
        times[SYNCS[1]].append(1e3 * (time.perf_counter() - start))
        sizes[SYNCS[1]] = sum((path / file).stat().st_size for file in (WEIGHTS_NAME, CONFIG_NAME))
        start = time.perf_counter()
        file = folder / "merged.safetensors"
        merged(model, file)
        times[SYNCS[2]].append(1e3 * (time.perf_counter() - start))
        sizes[SYNCS[2]] = file.stat().st_size
    return {name: {"bytes": sizes[name], "ms": median(times[name][1:])} for name in SYNCS}


def merged(model: Any, file: Path) -> None:
    """Merge the adapter, write the base's weights, and unmerge it."""
    model.merge_adapter()
    tensors = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().contiguous()
        for name, value in model.named_parameters()
        if "lorasb_" not in name
    }
    save_file(tensors, str(file))
    model.unmerge_adapter()


def measured(python: str, seconds: float) -> dict[str, Any]:
    """Measure everything, with the folders in /dev/shm if there is one."""
    root = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as place:
        folder = Path(place)
        model = people(folder)
        engines = {BARE: Engine(python, 0), PLUGIN: Engine(python, MANY, folder), STOCK: Engine(python, ROWS + 1)}
        try:
            names = link(folder, MANY)
            added = engines[PLUGIN]("add", names=names, folder=str(folder))
            stock = engines[STOCK]("add", names=names[:ROWS], folder=str(folder / "plain"))
            found = speed(engines, seconds)
            resident = {way: one("run", names=[None] * ROWS, tokens=1)["resident"] for way, one in engines.items()}
            sync = syncing(model, engines, folder)
            for engine in engines.values():
                engine.close()
            return {
                "speed": found,
                "add_ms": {PLUGIN: median(added["ms"][ROWS:]), STOCK: median(stock["ms"][1:])},
                "slot_bytes": {PLUGIN: _numbers(folder / "user0"), STOCK: _numbers(folder / "plain" / "user0")},
                "resident": resident,
                "sync": sync,
                "held": {way: most(python, way, folder) for way in (PLUGIN, STOCK)},
            }
        finally:
            for engine in engines.values():
                engine.close()


def most(python: str, way: str, folder: Path) -> int:
    """Find how many adapters an engine of `MEMORY` bytes starts with and loads, to within 10%."""
    held, refused = 0, 0
    while not refused or held * 1.1 < refused:
        count = (held + refused) // 2 if refused else 2 * held or (MANY if way == PLUGIN else ROWS)
        if _holds(python, way, folder, count):
            held = count
        else:
            refused = count
    return held


def _holds(python: str, way: str, folder: Path, count: int) -> bool:
    names = link(folder, count)
    try:
        engine = Engine(python, count, folder if way == PLUGIN else None, MEMORY)
    except RuntimeError:
        return False
    try:
        engine("add", names=names, folder=str(folder if way == PLUGIN else folder / "plain"))
    except RuntimeError:
        return False
    finally:
        engine.close()
    return True


def _numbers(folder: Path) -> int:
    """Bytes that an adapter's values take in a slot."""
    tensors = load_file(folder / WEIGHTS_NAME)
    return sum(t.numel() for t in tensors.values() if t.is_floating_point()) * measured_dtype().itemsize


def tokens_per_second(one: dict[str, Any], percentile: str = "p50") -> float:
    """Tokens per second of an engine's batch, from a percentile of its milliseconds."""
    return 1e3 * ROWS * TOKENS / float(one[percentile])


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the speed table."""
    for name, one in found["speed"].items():
        rate = [tokens_per_second(one, p) for p in ("p50", "p80", "p20")]
        yield [name, f"{rate[0]:.0f} ({rate[1]:.0f} to {rate[2]:.0f})", f"{one['ratio']:.2f}x"]


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """Yield sentences on the cost of an adapter, of a thousand and of a step."""
    slots, added, resident = found["slot_bytes"], found["add_ms"], found["resident"]
    yield (
        f"A slot takes {slots[PLUGIN] / 1e6:.2f} MB in the plugin and {slots[STOCK] / 1e6:.1f} MB in vLLM, and an "
        f"adapter is added in {added[PLUGIN]:.1f} ms and {added[STOCK]:.0f} ms. {MANY} adapters are resident in "
        f"{(resident[PLUGIN] - resident[BARE]) / 1e9:.2f} GB more than the bare model; as plain LoRAs their slots "
        f"would take {MANY * slots[STOCK] / 1e9:.0f} GB, and vLLM keeps a second copy."
    )
    yield (
        f"Where a process may allocate {MEMORY >> 30} GiB, the plugin holds {found['held'][PLUGIN]:,} adapters and "
        f"vLLM {found['held'][STOCK]:,}; with 10% more, neither starts."
    )
    parts = [f"{name} {one['bytes'] / 1e6:.1f} MB and {one['ms']:.0f} ms" for name, one in found["sync"].items()]
    yield f"After a step a trainer writes, and the sampler loads: {', '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="Python of an environment with vLLM and lorasb")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path)
    dtype_option(parser)
    options = parser.parse_args(arguments)
    use_dtype(options.dtype)
    found = provenance(dtype=dtype_name()) | measured(options.vllm, options.seconds)
    show("", HEAD, rows(found))
    print(*sentences(found), sep="\n")
    if options.output:
        write_json(options.output / FILE, found)


if __name__ == "__main__":
    main()
