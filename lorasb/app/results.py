"""A run's result files: adapter, plain LoRA, answers, plots and summary, each written atomically, the summary last."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.model_card import add_usage
from ..constants import WEIGHTS_NAME
from ..init import InitReport
from ..utils import plotting
from ..utils.atomic_files import replacing_folder, write_json
from ..utils.plotting import GRAD, INK, MUTED, SIGN, canvas
from ..utils.plotting import save as save_figure
from ..utils.precision import processor_class
from ..utils.reading import parse_json, read_json, read_text
from .adapter import REPORT_NAME, load_report
from .ask import how_to, prompt_format
from .data import describe_data
from .evaluation import Evaluation, score_by_source
from .prepare import Run, by_adapter, device, save_adapter
from .problem import Classification
from .run_folder import ANSWERS_NAME, SUMMARY_NAME
from .tasks import Example
from .terminal import console
from .train import Trained


@dataclass(frozen=True)
class Result:
    """The results of a run: summary.json, held-out examples with answers before and after, and the init report."""

    summary: dict[str, Any]
    examples: list[Example]
    before: Evaluation
    after: Evaluation
    report: InitReport | None


def summarize(
    run: Run, before: Evaluation, after: Evaluation, init_seconds: float, trained: Trained, identity: dict[str, Any]
) -> dict[str, Any]:
    """The content of summary.json, without the adapter's size, which `save` adds."""
    return {
        "eval_loss_before": before.loss,
        "eval_loss_after": after.loss,
        "eval_accuracy_before": before.accuracy,
        "eval_accuracy_after": after.accuracy,
        "eval_accuracy_by_set": {
            "before": score_by_source(run.held_out, before.answers),
            "after": score_by_source(run.held_out, after.answers),
        },
        "adapters": by_adapter(run, before.answers, after.answers),
        "eval_scores": sorted({example.score for example in run.held_out}),
        "eval_examples": len(run.held_out),
        "trainable_params": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "base_params": base_parameters(run.model),
        "base_bytes": base_bytes(run.model),
        "init_seconds": init_seconds,
        "train_seconds": trained.seconds,
        "train_steps": run.steps,
        "tokens_per_second": _tokens(run, trained) / trained.seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "lr": run.lr,
        "epochs": run.epochs,
        "rank": run.model.peft_config["default"].r,
        "dtype": run.precision.name,
        "dtype_reason": run.precision.reason,
        "machine": torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {processor_class()}",
        "train_losses": [entry["loss"] for entry in trained.history if "loss" in entry],
        "basis_fit": run.fit,
        "rewards": [float(entry["reward"]) for entry in trained.history if "reward" in entry],
        "eval_losses": [[entry["step"], entry["eval_loss"]] for entry in trained.history if "eval_loss" in entry],
        "prompt_format": prompt_format(run),
        "classes": list(run.problem.classes) if isinstance(run.problem, Classification) else None,
        "config": asdict(run.settings),
        "identity": identity,
    }


def _tokens(run: Run, trained: Trained) -> float:
    """Training tokens: those of the examples, or with `--rl` those that were sampled and their prompts."""
    sampled = [entry["num_tokens"] for entry in trained.history if "num_tokens" in entry]
    return float(sampled[-1]) if sampled else run.tokens


def save(run: Run, result: Result, history: list[dict[str, Any]]) -> None:
    """Write the run's files; the summary gets the adapter's size and is written last."""
    # Files: adapter/, lora/ (the exact plain LoRA), report.json, loss.png, energy.png, answers.json, summary.json. With
    # method="lora" there is no export (it is a LoRA already) and no report. With `--adapter-column`, adapter/ has the
    # basis and a folder for each adapter, and nothing is exported: a LoRA of each would be larger by far.

    settings, folder, summary = run.settings, Path(run.settings.output), result.summary
    # An interrupted save leaves the former folder in place: `replacing_folder` renames a complete one over it.
    with replacing_folder(folder / "adapter") as target:
        save_adapter(run, target)
        add_usage(target, _usage(how_to(summary, folder)))
    summary["adapter_bytes"] = (folder / "adapter" / WEIGHTS_NAME).stat().st_size
    pictures = plotting.installed()
    if result.report is not None:
        _save_export_and_report(run, result.report, folder)
    data = describe_data(settings, len(run.train_ids))
    title = f"{settings.method}, r={summary['rank']}: {data}, lr {run.lr:g}"
    if pictures:
        plot_loss(history, summary["eval_loss_before"], summary["eval_loss_after"], folder / "loss.png", title)
    else:
        console.print("no pictures, as matplotlib is not installed: pip install matplotlib", highlight=False)
    write_json(folder / ANSWERS_NAME, _answers(result))
    write_json(folder / SUMMARY_NAME, summary)  # last: a summary says that the run is finished


def _usage(how_to: dict[str, str]) -> str:
    """The model card's paragraph on how to use a run's adapter."""
    return f"```\n{how_to['command']}\n```\n\n```python\n{how_to['python']}\n```"


def _save_export_and_report(run: Run, report: InitReport, folder: Path) -> None:
    from ..export.lora import export_lora

    if not run.adapters:
        with replacing_folder(folder / "lora") as target:
            export_lora(run.model, target, quiet=True)
    report.save(folder / REPORT_NAME)
    if report.energy_sign is not None and plotting.installed():
        report.plot(folder / "energy.png")


def _answers(result: Result) -> list[dict[str, str]]:
    rows = zip(result.examples, result.before.answers, result.after.answers, strict=True)
    return [
        {
            "prompt": e.prompt,
            "completion": e.completion,
            "source": e.source,
            "score": e.score,
            **({"adapter": e.adapter} if e.adapter else {}),
            "before": old,
            "after": new,
        }
        for e, old, new in rows
    ]


def load(folder: Path) -> Result:
    """The results of a finished run, from its files."""
    try:
        summary = read_json(folder / SUMMARY_NAME)
        rows = parse_json(read_text(folder / ANSWERS_NAME), ANSWERS_NAME)
        known = ("prompt", "completion", "source", "score", "adapter")
        examples = [Example(**{name: row[name] for name in known if name in row}) for row in rows]
        evaluations = [
            Evaluation.of(summary[f"eval_loss_{at}"], summary[f"eval_accuracy_{at}"], [row[at] for row in rows])
            for at in ("before", "after")
        ]
        return Result(summary, examples, evaluations[0], evaluations[1], load_report(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} has a finished run, but its files are incomplete ({error}): --resume never runs it again"
        ) from None


def base_parameters(model: nn.Module) -> int:
    """Number of parameters of the base model, dense and quantized."""
    return sum(p.numel() for p in _dense(model)) + sum(math.prod(weight.shape) for weight in _quantized(model))


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base model's weights, with the statistics (absmax) of quantized ones."""
    dense = sum(p.numel() * p.element_size() for p in _dense(model))
    return dense + sum(weight.nbytes for weight in _quantized(model))


def _dense(model: nn.Module) -> list[nn.Parameter]:
    # "lora" is in PEFT's lora_A and in lorasb_A alike; packed 4-bit weights are integers
    return [p for name, p in model.named_parameters() if "lora" not in name and p.is_floating_point()]


def _quantized(model: nn.Module) -> Sequence[Any]:
    from ..quantization.quantized_weight import is_quantized, of_module

    return [of_module(module) for module in model.modules() if is_quantized(module) and isinstance(module, nn.Linear)]


SMOOTHING = 0.75  # weight of the past in the moving average, about four steps


def plot_loss(history: list[dict[str, Any]], before: float, after: float, path: Path, title: str) -> None:
    """Plot the training loss by step, raw and smoothed, and the held-out loss before and after, into a PNG."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = canvas()
    steps, losses = zip(*points, strict=True) if points else ((0,), (before,))
    axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.7, label="training loss, by step")
    axes.plot(steps, smoothed(losses), color=SIGN, linewidth=2, label="training loss, smoothed")
    last = max(steps)
    axes.plot([0, last], [before, after], "o", color=GRAD, markersize=8, zorder=5, label="held-out loss")
    for x, y, side in ((0, before, "left"), (last, after, "right")):
        offset = (10, 0) if side == "left" else (-6, 12)
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=offset, ha=side, color=INK)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    save_figure(figure, axes, title, path)


def smoothed(losses: tuple[float, ...]) -> list[float]:
    """Exponential moving average with bias correction, as Adam's: divided by the sum of weights so far."""
    average, weight, averages = 0.0, 0.0, []
    for loss in losses:
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        averages.append(average / weight)
    return averages
