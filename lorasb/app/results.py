"""Write and read a run's results (adapter, plain LoRA, answers, plots, summary); answer questions for `lorasb ask`.

Each file is written atomically, the summary last.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from ..checkpoints.model_card import add_usage
from ..constants import FACTORS_NAME, WEIGHTS_NAME
from ..export import lora
from ..init import InitReport
from ..quantization.quantized_weight import is_quantized, of_module
from ..serving import basis
from ..utils import plotting
from ..utils.atomic_files import cache_dir, replacing_folder, write_json
from ..utils.plotting import GRAD, INK, MUTED, SIGN
from ..utils.precision import processor_class, resolve
from ..utils.reading import Json, parse_json, read_json, read_text
from .adapter import REPORT_NAME, load_report, write_card
from .data import INSTRUCTION, STEP_BY_STEP, Example
from .evaluation import Classification, Evaluation, HeldOut, LanguageModeling, Problem, generate_answers, score_by
from .prepare import Run, check_positions, device, load_model, save_adapter
from .run_folder import ANSWERS_NAME, SUMMARY_NAME
from .scoring import is_right
from .settings import CONFIG_NAME, EMBEDDED, Settings, read_config
from .terminal import console
from .tokenize import messages_of
from .train import peak_memory, peak_rss

SAVED = ("prompt", "completion", "source", "score", "adapter")  # fields of an Example in answers.json


@dataclass(frozen=True)
class Result:
    """The results of a run: summary.json, held-out examples with answers before and after, and the init report."""

    summary: Json
    examples: Sequence[Example]
    before: Evaluation
    after: Evaluation
    report: InitReport | None


def summarize(
    run: Run,
    before: Evaluation,
    after: Evaluation,
    init_seconds: float,
    history: Sequence[Json],
    train_seconds: float,
) -> Json:
    """Return the content of summary.json, without the identity (added by the caller) and adapter size (by `save`)."""
    examples, said = run.held_out.examples, {"before": before.answers, "after": after.answers}
    by_set = {at: score_by("source", examples, answers) for at, answers in said.items()}
    base_params, base_bytes = base_size(run.model)
    # with `--rl`, the number of sampled tokens and prompt tokens
    sampled = [float(entry["num_tokens"]) for entry in history if "num_tokens" in entry]
    return {
        "eval_loss_before": before.loss,
        "eval_loss_after": after.loss,
        "eval_accuracy_before": before.accuracy,
        "eval_accuracy_after": after.accuracy,
        "eval_accuracy_by_set": by_set if len(by_set["before"]) > 1 else {"before": {}, "after": {}},
        "adapters": _by_adapter(run, said),
        "eval_scores": sorted({example.score for example in examples}),
        "eval_examples": len(examples),
        "trainable_params": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "base_params": base_params,
        "base_bytes": base_bytes,
        "init_seconds": init_seconds,
        "train_seconds": train_seconds,
        "train_steps": run.steps,
        "tokens_per_second": (sampled[-1] if sampled else run.tokens) / train_seconds,
        "peak_rss_mb": peak_rss() / 2**20,
        "peak_gpu_mb": peak_memory() / 2**20 if device() == "cuda" else None,
        "lr": run.lr,
        "epochs": run.epochs,
        "rank": run.model.peft_config["default"].r,
        "dtype": run.precision.name,
        "dtype_reason": run.precision.reason,
        "machine": torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {processor_class()}",
        "train_losses": [entry["loss"] for entry in history if "loss" in entry],
        "basis_fit": run.fit,
        "rewards": [float(entry["reward"]) for entry in history if "reward" in entry],
        "eval_losses": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "prompt_format": prompt_format(run),
        "system": system_message(run.train),
        "classes": list(run.problem.classes) if isinstance(run.problem, Classification) else None,
        "config": asdict(run.settings),
    }


def _by_adapter(run: Run, said: dict[str, list[str]]) -> Json:
    """Count each adapter's training and held-out examples, and score the held-out ones before and after."""
    if not run.adapters:
        return {}
    trained, held_out = (Counter(example.adapter for example in part) for part in (run.train, run.held_out.examples))
    scores = {at: score_by("adapter", run.held_out.examples, answers) for at, answers in said.items()}
    return {
        name: {"train_examples": trained[name], "eval_examples": held_out[name]}
        | {at: found[name] for at, found in scores.items() if name in found}
        for name in run.adapters
    }


def save(run: Run, result: Result, history: list[Json]) -> None:
    """Write the run's files; add the adapter's size to the summary, which is written last."""
    settings, folder, summary, report = run.settings, Path(run.settings.output), result.summary, result.report
    # An interrupted save leaves the old folder intact: `replacing_folder` replaces it only with a complete one.
    with replacing_folder(folder / "adapter") as target:
        save_adapter(run, target)
        if run.adapters and settings.basis is None:  # so that more adapters can be trained on this A and B
            tasks = {Path(settings.data or "").stem: {"examples": float(len(run.train)), "kept": 1.0}}
            write_card(target, settings, tasks, run.precision.name)
        usage = how_to(summary, folder)
        add_usage(target, f"```\n{usage['command']}\n```\n\n```python\n{usage['python']}\n```")
    files = (folder / "adapter" / name for name in (WEIGHTS_NAME, FACTORS_NAME))  # FACTORS_NAME: only on a basis
    summary["adapter_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    if report is not None:
        if not run.adapters:  # one LoRA per adapter would be far larger
            with replacing_folder(folder / "lora") as target:
                lora.export_lora(run.model, target, quiet=True)
        report.save(folder / REPORT_NAME)
    if plotting.installed():
        if report is not None and report.energy_sign is not None:
            report.plot(folder / "energy.png")
        title = f"{settings.method}, r={summary['rank']}: {run.data}, lr {run.lr:.3g}"
        plot_loss(history, summary["eval_loss_before"], summary["eval_loss_after"], folder / "loss.png", title)
    else:
        console.print("no pictures, as matplotlib is not installed: pip install matplotlib", highlight=False)
    rows = zip(result.examples, result.before.answers, result.after.answers, strict=True)
    answers = [
        {name: getattr(e, name) for name in SAVED if name != "adapter" or e.adapter} | {"before": old, "after": new}
        for e, old, new in rows
    ]
    write_json(folder / ANSWERS_NAME, answers)
    write_json(folder / SUMMARY_NAME, summary)  # last: its presence marks the run as finished


def load(folder: Path) -> Result:
    """Read the results of a finished run from its files."""
    try:
        summary = read_json(folder / SUMMARY_NAME)
        rows = parse_json(read_text(folder / ANSWERS_NAME), ANSWERS_NAME)
        examples = [Example(**{name: row[name] for name in SAVED if name in row}) for row in rows]
        before, after = (
            Evaluation(summary[f"eval_loss_{at}"], summary[f"eval_accuracy_{at}"], [row[at] for row in rows])
            for at in ("before", "after")
        )
        return Result(summary, examples, before, after, load_report(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} has a finished run, but its files are incomplete ({error}): run it again with --resume never"
        ) from None


def base_size(model: nn.Module) -> tuple[int, int]:
    """Return the base model's number of parameters and of bytes, including the absmax of quantized weights."""
    # "lora" matches PEFT's lora_A and lorasb_A; packed 4-bit weights are integers, counted separately
    dense = [p for name, p in model.named_parameters() if "lora" not in name and p.is_floating_point()]
    found = (of_module(one) for one in model.modules() if isinstance(one, nn.Linear) and is_quantized(one))
    sizes = [(p.numel(), p.nbytes) for p in dense] + [(math.prod(w.shape), w.nbytes) for w in found]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


SMOOTHING = 0.75  # decay of the moving average: spans about four steps


def plot_loss(history: list[Json], before: float, after: float, path: Path, title: str) -> None:
    """Plot the training loss per step (raw and smoothed) and the held-out loss before and after, as a PNG."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = plotting.canvas()
    steps, losses = zip(*points, strict=True) if points else ((0,), (before,))
    axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.7, label="training loss, by step")
    axes.plot(steps, smoothed(losses), color=SIGN, linewidth=2, label="training loss, smoothed")
    last = max(steps)
    axes.plot([0, last], [before, after], "o", color=GRAD, markersize=8, zorder=5, label="held-out loss")
    for x, y, side, offset in ((0, before, "left", (10, 0)), (last, after, "right", (-6, 12))):
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=offset, ha=side, color=INK)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    plotting.save(figure, axes, title, path)


def smoothed(losses: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average, bias-corrected as in Adam: divided by the sum of weights so far."""
    average, weight, averages = 0.0, 0.0, []
    for loss in losses:
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        averages.append(average / weight)
    return averages


TOKENS = 256  # default maximum per answer
CHAT, INSTRUCTED, STEPS, PLAIN, PAIR = "chat", "instruction", "instruction, step by step", "plain", "pair"
IN_WORDS = {
    CHAT: "in its chat template",
    INSTRUCTED: "in Alpaca's instruction format",
    STEPS: "in Alpaca's instruction format, to think step by step",
    PLAIN: "as plain text",
    PAIR: "as a pair of texts",
}


def prompt_format(run: Run) -> str:
    """Describe the form of a run's prompts, for its summary."""
    example = run.train[0]
    if example.label is not None:  # classifiers read the raw text
        return PAIR if all(one.pair for one in run.train) else PLAIN  # a text pair is optional per row
    if messages_of(example, run.tokenizer, run.settings.template == "auto"):
        return CHAT
    if example.formatted:
        return STEPS if example.prompt.endswith(STEP_BY_STEP) else INSTRUCTED
    return PLAIN


def system_message(examples: Sequence[Example]) -> str:
    """Return the system message that starts every chat; "" if chats have none or differ."""
    first = {
        one.messages[0]["content"] if one.messages[:1] and one.messages[0]["role"] == "system" else ""
        for one in examples
    }
    return first.pop() if len(first) == 1 else ""


def question_example(question: str, kind: str, system: str = "") -> Example:
    """Format a question like the run's examples, without an answer."""
    template = {INSTRUCTED: INSTRUCTION, STEPS: INSTRUCTION + STEP_BY_STEP}.get(kind, "{instruction}")
    turns = (*_turns(question, system), {"role": "assistant", "content": ""})
    return Example(template.format(instruction=question), "", messages=turns if kind == CHAT else ())


def _turns(question: str, system: str) -> list[dict[str, str]]:
    """A chat that ends with a question."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def answers(
    run: Path,
    question: str | None,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
    base_model: str | None = None,
    second: str | None = None,
) -> Iterator[str]:
    """Yield greedily decoded answers (labels from a classifier) to one question, or to each typed line.

    A classifier of pairs takes a `second` text, which follows a tab in a typed line.
    """
    summary, settings = _read(run)
    settings = replace(settings, model=base_model or settings.model)
    names = sorted(summary.get("adapters") or ())
    if adapter not in (names or [None]):
        known = f"it has {', '.join(names[:8])}" if names else "it trained one adapter: leave --adapter out"
        raise ValueError(f"--adapter has to name one of the run's adapters, got {adapter!r}: {known}")
    problem: Problem = Classification(summary["classes"]) if summary.get("classes") is not None else LanguageModeling()
    if question is not None and not question.strip():
        raise ValueError("expected a question, got an empty one: leave it out to type questions line by line")
    takes_pairs = summary["prompt_format"] == PAIR
    logging.disable_progress_bar()
    tokenizer, base = load_model(settings, problem, resolve(settings.dtype, device()).dtype)
    model = PeftModel.from_pretrained(base, str(run / "adapter"))
    if adapter is not None:
        basis.load_adapters(model, run / "adapter", [adapter])
        model.set_adapter(adapter)
    model.eval()
    for one, other in _questions(takes_pairs) if question is None else [(question, second or "")]:
        if bool(other) != takes_pairs:
            wanted = "two texts (typed: with a tab between them)" if takes_pairs else "one question"
            raise ValueError(f"expected {wanted}, as this run was trained on, got {'two' if other else 'one'}")
        if isinstance(problem, Classification):
            example = Example(one, problem.classes[0] if problem.classes else "0", pair=other, label=0)
            text = problem.encode(example, tokenizer, settings.max_length)
            yield problem.evaluate(model, tokenizer, HeldOut([example], [text], 1), "").answers[0]
        else:
            example = question_example(one, summary["prompt_format"], summary.get("system", ""))
            encoded = problem.encode(example, tokenizer, settings.max_length, held_out=True)
            limit = max_new_tokens or settings.max_new_tokens or TOKENS
            check_positions(
                base, settings.model, len(encoded.prompt) + limit, "--max-new-tokens, or a shorter question"
            )
            yield generate_answers(model, tokenizer, [encoded], limit=limit)[0]


def _read(run: Path) -> tuple[Json, Settings]:
    """A finished run's summary and settings."""
    file = run / SUMMARY_NAME
    if not file.is_file():
        found = f"has no {SUMMARY_NAME}: repeat the command that started it, which resumes it"
        if not run.is_dir():
            found = f"does not exist in {Path.cwd()}"
        elif (run / WEIGHTS_NAME).is_file():
            found = f"is an adapter: ask its run, {run.parent}"
        raise ValueError(f"expected the folder of a finished run: {run} {found}")
    summary = read_json(file)
    if "prompt_format" not in summary:
        raise ValueError(f"{file} has no prompt format: an earlier version of lorasb wrote it")
    return summary, Settings(**read_config(run / CONFIG_NAME))


def _questions(takes_pairs: bool) -> Iterator[tuple[str, str]]:
    """Yield nonempty lines of standard input, those of pairs split at a tab; show a prompt on a terminal."""
    with suppress(EOFError):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                first, _, second = line.partition("\t") if takes_pairs else (line, "", "")
                yield first, second


def example_to_ask(result: Result) -> Example:
    """Return the first held-out example answered right, else the first one."""
    rows = zip(result.examples, result.after.answers, strict=True)
    right = (example for example, said in rows if is_right(said, example.completion, example.score))
    return next(right, result.examples[0])


def how_to(summary: Json, folder: Path, example: Example | None = None) -> dict[str, str]:
    """Return shell commands and Python code that use a run's adapter, for the terminal and the model card."""
    example = example or Example("QUESTION", "", pair="SECOND" if summary["prompt_format"] == PAIR else "")
    names = summary["adapters"] or ()
    name = example.adapter if example.adapter in names else min(names, default="")  # the first of several
    # these prompts contain more than the question
    question = "QUESTION" if summary["prompt_format"] in (INSTRUCTED, STEPS) else example.prompt
    words = [str(folder), question, *([example.pair] if example.pair else ()), *(["--adapter", name] if name else ())]
    command = f"lorasb ask {shlex.join(words)}"
    adapter, base = folder / "adapter" / name, os.path.expanduser(summary["config"]["model"])  # `--model=~/x`
    model = str(cache_dir() / EMBEDDED) if base == EMBEDDED else base  # where the run has loaded it from
    basis = summary["config"].get("basis")
    if basis or name:
        module = f"{name or 'adapter'}={adapter}"
        basis, model, module = map(shlex.quote, (basis or str(folder / "adapter"), model, module))
        serve = f"LORASB_BASIS={basis} vllm serve {model} --enable-lora --lora-modules {module}"
    else:
        largest = max([summary["rank"], *(summary["config"].get("rank_pattern") or {}).values()])
        serve = lora.serve_command(model, folder / "lora", largest)
    return {"command": command, "python": "\n".join(_python(summary, adapter)), "serve": serve}


def _python(summary: Json, adapter: Path) -> Iterator[str]:
    base = os.path.expanduser(summary["config"]["model"])
    classes, kind = summary["classes"], summary["prompt_format"]
    load = "AutoModelForCausalLM.from_pretrained(base)"
    if classes is not None:
        load = f"AutoModelForSequenceClassification.from_pretrained(base, num_labels={max(1, len(classes))})"
    yield "import lorasb, peft, transformers  # lorasb registers its method with PEFT"
    yield f"base = {'lorasb.demo_model()' if base == EMBEDDED else repr(base)}"
    loaded = f"transformers.{load}"
    if summary["config"].get("bits") == 4:
        loaded = f'lorasb.quantize({loaded}, "nf4", nested=True)'
    yield f"model = peft.PeftModel.from_pretrained({loaded}, {str(adapter)!r})"
    yield "tokenizer = transformers.AutoTokenizer.from_pretrained(base)"
    if classes is not None:
        texts = '"TEXT", "SECOND"' if kind == PAIR else '"TEXT"'
        yield f'print(model(**tokenizer({texts}, return_tensors="pt")).logits)'
        return
    inputs = f'tokenizer({question_example("QUESTION", kind).prompt!r}, return_tensors="pt")'
    if kind == CHAT:
        turns = json.dumps(_turns("QUESTION", summary.get("system", "")), ensure_ascii=False)
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = f"tokenizer.apply_chat_template({turns}, {options})"
    yield f"inputs = {inputs}"
    yield f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={TOKENS})[0]))"
