"""`lorasb plan` compared with measurements: the peak memory of training steps of three models on the CPU.

    python -m benchmarks.training.planned [--json] [--output FILE] [--repeats 5]

Each model trains three steps in bf16 and in fp32, each in a separate process. Its peak resident memory, as the Linux
kernel reports it (VmHWM), less that before the model is made, is measured twice. With glibc set to return freed memory
at once, only live memory is resident: it is compared with the plan's live bytes. With glibc's own settings it is
compared with the plan including what allocators hold. That varies from run to run with where small objects fall
between a heap's tensors, so the median of several runs is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common.tables import show
from benchmarks.common.timing import commit, dtype_name, machine_name
from benchmarks.research.reporting.markdown import table as markdown
from lorasb.app.plan import MemoryPlan, Request, dtype_of, plan_memory
from lorasb.app.prepare import EMBEDDED

BATCH, SEQ, STEPS = 2, 512, 3
DTYPES = ("bfloat16", "float32")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2 medium": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1024, "n_layer": 24, "n_head": 16,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
FILE = "planned-cpu.json"


@dataclass(frozen=True)
class Found:
    """Planned and measured bytes of a model's training steps: live ones, and (per run) with what glibc holds."""

    model: str
    checkpointing: bool
    planned_alive: int
    alive: int
    planned: int
    resident: list[int]

    @property
    def ratios(self) -> tuple[float, float]:
        """Planned over measured: of live bytes, and of the median with what glibc holds."""
        return self.planned_alive / self.alive, self.planned / statistics.median(self.resident)


def measure(folder: str, dtype: str, checkpointing: bool, gives_back: bool) -> int:
    """Peak resident bytes of a process, less those before it makes the model."""
    environment = os.environ | (GIVES_BACK if gives_back else {})
    options = ["--child", folder, "--dtype", dtype, *(["--checkpointing"] if checkpointing else [])]
    command = [sys.executable, "-m", __spec__.name, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def child(folder: str, dtype_name: str, checkpointing: bool) -> int:
    """Train a few steps, and read the peak from the Linux kernel."""
    import transformers

    import lorasb
    from lorasb.app.prepare import checkpoint_activations, resolve_model

    config = transformers.AutoConfig.from_pretrained(resolve_model(folder))
    kind = getattr(transformers, config.architectures[0])  # imported before memory is counted
    dtype = getattr(torch, dtype_name)
    torch.nn.Linear(64, 64).to(dtype)(torch.ones(32, 64, dtype=dtype)).sum().backward()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    model = lorasb.patch(kind._from_config(config, dtype=dtype), init="random")
    if checkpointing:
        checkpoint_activations(model.get_base_model())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, config.vocab_size, (BATCH, SEQ))
    model.train()
    Path("/proc/self/clear_refs").write_text("5")  # excludes the peak of making and patching
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before


def alive(found: MemoryPlan) -> int:
    """Planned bytes without those that allocators hold."""
    return found.step - found.reserve


def compare(name: str, folder: str, dtype: str, checkpointing: bool, repeats: int) -> Found:
    """A model's plan and measurements."""
    expected = plan_memory(Request(folder, batch=BATCH, seq=SEQ, checkpointing=checkpointing, dtype=dtype))
    kept = measure(folder, dtype, checkpointing, gives_back=True)
    resident = [measure(folder, dtype, checkpointing, gives_back=False) for _ in range(repeats)]
    return Found(f"{name}, {dtype}", checkpointing, alive(expected), kept, expected.step, resident)


def machine() -> str:
    """This machine and its dtype."""
    return machine_name(dtype_name(dtype_of(Request(EMBEDDED))))


HEAD = ("model", "alive, planned", "measured", "ratio", "resident, planned", "measured", "ratio")


def line(one: Found) -> list[str]:
    """A model's row."""
    title = one.model + (", checkpointing" if one.checkpointing else "")
    middle = statistics.median(one.resident)
    sizes = [f"{size / 1e6:.0f} MB" for size in (one.planned_alive, one.alive, one.planned, middle)]
    live, resident = (f"{ratio:.2f}" for ratio in one.ratios)
    return [title, *sizes[:2], live, *sizes[2:], resident]


def page(results: dict[str, Any]) -> list[str]:
    """The table as lines of Markdown, from a file of results."""
    return list(markdown(list(HEAD), (line(Found(**run)) for run in results["runs"])))


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="write the JSON to a file, too")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each model under glibc's own settings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(child(options.child, options.dtype, options.checkpointing))
        return
    found = []
    with tempfile.TemporaryDirectory() as root:
        folders = {"SmolLM2-135M": EMBEDDED}
        for name, config in CONFIGS.items():
            folder = Path(root, name)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            folders[name] = str(folder)
        for name, where in folders.items():
            for dtype in DTYPES:
                found += [compare(name, where, dtype, again, options.repeats) for again in (False, True)]
    values = {
        "version": commit(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": [asdict(one) for one in found],
    }
    if options.output:
        options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(values, indent=1))
    else:
        title = f"Peak of training steps of {BATCH} x {SEQ} tokens beyond the process itself, {machine()}"
        show(title, HEAD, map(line, found))


if __name__ == "__main__":
    main()
