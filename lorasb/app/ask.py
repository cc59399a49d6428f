"""`lorasb ask`: questions to what a run has trained, put as its training examples were, and the same in Python."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..serving import basis_adapters
from ..utils.precision import resolve
from ..utils.reading import read_json
from .config_file import CONFIG_NAME, read_config
from .data import INSTRUCTION, STEP_BY_STEP
from .evaluation import HeldOut, generate_answers
from .prepare import Run, device, load_model
from .problem import Classification, LanguageModeling, Problem
from .run_folder import SUMMARY_NAME
from .settings import EMBEDDED, Settings, listed
from .tasks import Example
from .tokenize import messages_of

TOKENS = 256  # of an answer, at most
CHAT, INSTRUCTED, STEPS, PLAIN = "chat", "instruction", "instruction, step by step", "plain"


def prompt_format(run: Run) -> str:
    """Describe the form of a run's prompts, for its summary."""
    example = run.train[0]
    if messages_of(example, run.tokenizer, run.settings.template == "auto"):
        return CHAT
    if example.formatted:
        return STEPS if example.prompt.endswith(STEP_BY_STEP) else INSTRUCTED
    return PLAIN


def asked(question: str, kind: str) -> Example:
    """A question in the form of a run's examples, without an answer."""
    if kind == CHAT:
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": ""}
        return Example(question, "", messages=turns)
    if kind in (INSTRUCTED, STEPS):
        prompt = INSTRUCTION.format(instruction=question) + (STEP_BY_STEP if kind == STEPS else "")
        return Example(prompt, "", formatted=True)
    return Example(question, "")


def answers(
    run: Path, question: str | None, adapter: str | None = None, max_new_tokens: int | None = None
) -> Iterator[str]:
    """Answers to one question, or to each line that is typed, decoded greedily; labels for a classifier."""
    summary, settings = _read(run)
    names = sorted(summary.get("adapters") or ())
    if (adapter is None) == bool(names) or (adapter is not None and adapter not in names):
        known = f"it has {', '.join(names[:8])}" if names else "it trained one"
        raise ValueError(f"--adapter has to name one of the run's adapters, got {adapter!r}: {known}")
    problem: Problem = Classification(summary["classes"]) if summary.get("classes") is not None else LanguageModeling()
    tokenizer, model = _load(run, settings, problem, adapter)
    if question is not None and not question.strip():
        raise ValueError("expected a question, got an empty one: leave it out to type some")
    for one in _questions() if question is None else [question]:
        example = asked(one, summary["prompt_format"])
        if isinstance(problem, Classification):
            example = Example(one, problem.classes[0] if problem.classes else "0", label=0)
        encoded = problem.encode(example, tokenizer, settings.max_length, held_out=True)
        if isinstance(problem, Classification):
            yield problem.evaluate(model, tokenizer, HeldOut([example], [encoded], 1), "").answers[0]
            continue
        limit = max_new_tokens or settings.max_new_tokens or TOKENS
        with tqdm(disable=True) as bar:
            yield generate_answers(model, tokenizer, [encoded], bar, limit)[0]


def _read(run: Path) -> tuple[dict[str, Any], Settings]:
    """A finished run's summary and settings."""
    if not (run / SUMMARY_NAME).is_file():
        raise ValueError(f"expected the folder of a finished run, found no {SUMMARY_NAME} in {run}")
    summary = read_json(run / SUMMARY_NAME)
    if "prompt_format" not in summary:
        raise ValueError(
            f"{run / SUMMARY_NAME} does not say how questions are put: an earlier version of lorasb wrote it"
        )
    return summary, Settings(**read_config(run / CONFIG_NAME, {one.name: kind for one, kind in listed(Settings)}))


def _load(run: Path, settings: Settings, problem: Problem, adapter: str | None) -> tuple[Any, Any]:
    import peft
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer, base = load_model(settings, problem, resolve(settings.dtype, device()).dtype)
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter"))
    if adapter is not None:
        basis_adapters.load_adapters(model, run / "adapter", [adapter])
        model.set_adapter(adapter)
    return tokenizer, model.eval()


def _questions() -> Iterator[str]:
    """Lines of the standard input, with a prompt on a terminal."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def how_to(summary: dict[str, Any], folder: Path, question: str = "QUESTION") -> dict[str, str]:
    """Commands that use what a run has trained, for its last lines and its model card: in a shell and in Python."""
    names = sorted(summary["adapters"] or ())
    extra = f" --adapter {names[0]}" if names else ""
    if summary["prompt_format"] in (INSTRUCTED, STEPS):  # the examples' prompts have more than the question
        question = "QUESTION"
    command = f"lorasb ask {shlex.quote(str(folder))} {shlex.quote(' '.join(question.split()))}{extra}"
    return {"command": command, "python": "\n".join(_python(summary, folder))}


def _python(summary: dict[str, Any], folder: Path) -> Iterator[str]:
    base, classes, kind = summary["config"]["model"], summary["classes"], summary["prompt_format"]
    load = "AutoModelForCausalLM.from_pretrained(base)"
    if classes is not None:
        load = f"AutoModelForSequenceClassification.from_pretrained(base, num_labels={max(1, len(classes))})"
    yield "import lorasb, peft, transformers  # lorasb registers its method with PEFT"
    yield f"base = {'lorasb.demo_model()' if base == EMBEDDED else repr(base)}"
    yield f"model = peft.PeftModel.from_pretrained(transformers.{load}, {str(folder / 'adapter')!r})"
    yield "tokenizer = transformers.AutoTokenizer.from_pretrained(base)"
    if classes is not None:
        yield 'print(model(**tokenizer("TEXT", return_tensors="pt")).logits)'
        return
    inputs = f'tokenizer({asked("QUESTION", kind).prompt!r}, return_tensors="pt")'
    if kind == CHAT:
        turns = '[{"role": "user", "content": "QUESTION"}]'
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = f"tokenizer.apply_chat_template({turns}, {options})"
    yield f"inputs = {inputs}"
    yield f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={TOKENS})[0]))"
