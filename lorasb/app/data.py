"""A run's examples: of files, named data sets and generators; held out ones, and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from ..utils.reading import parse_json, read_text
from .settings import Settings, nearest
from .tasks import HELD_OUT_SEED, Example, Row, are_values, generate, labeled, read_jsonl, text_of, with_adapter


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no held-out prompt is in the training set."""
    if settings.data is None:
        task = settings.generated_task
        held_out = generate(task, settings.eval_examples, HELD_OUT_SEED + settings.seed)
        return generate(task, settings.train_examples, settings.seed, exclude=held_out), held_out
    train_examples = read_data(settings.data, settings.score, adapter_column=settings.adapter_column)
    held_out = _held_out(settings, train_examples)
    remaining = _others(train_examples, held_out)
    # An adapter whose examples were all drawn would have none to train on.
    known = {example.adapter for example in remaining}
    if settings.eval_data is None and any(example.adapter not in known for example in held_out):
        held_out = [example for example in held_out if example.adapter in known]
        remaining = _others(train_examples, held_out)
    if not remaining or not held_out:
        raise ValueError(f"{settings.data} has too few examples to hold some out: add more, or another --eval-data")
    return remaining, held_out


def _others(examples: list[Example], held_out: list[Example]) -> list[Example]:
    """By prompt, not by position: duplicates of a held-out prompt must not be trained on either."""
    prompts = {_prompt(example) for example in held_out}
    return [example for example in examples if _prompt(example) not in prompts]


def _prompt(example: Example) -> str:
    """Key of an example's question, whatever the answer; `messages` are dictionaries, which have no hash."""
    return json.dumps([example.prompt, example.pair, example.messages[:-1], example.adapter])


def _held_out(settings: Settings, train_examples: list[Example]) -> list[Example]:
    """Examples of each set of `--eval-data`, or else up to a tenth of the training set's; drawn at random."""
    if settings.eval_data is not None:
        column = settings.adapter_column
        parts = (read_data(name.strip(), settings.score, True, column) for name in settings.eval_data.split(","))
        return [example for part in parts for example in _drawn(part, settings.eval_examples, settings.seed)]
    return _drawn(train_examples, max(1, min(settings.eval_examples, len(train_examples) // 10)), settings.seed)


def _drawn(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` of the examples, or all of them in their order. By the seed alone: a resumed run holds out the same."""
    import torch  # `lorasb --help` does without

    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[:count]]


def digest(*parts: Sequence[Example]) -> str:
    """SHA-256 over lists of examples, in order; the same for a file by another path."""
    text = json.dumps([[astuple(replace(example, source="")) for example in part] for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
STEP_BY_STEP = " Let's think step by step."  # MetaMathQA's authors end the prompts of their evaluation with it
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class Source:
    """A data set on the hub."""

    path: str  # its id
    example: Callable[[Row], Example]  # from a row to an Example
    score: str  # how its answers are scored, see `scoring`
    train: str = "train"  # its training split, as `datasets.load_dataset` takes it
    held_out: str | None = "test"  # its held-out split; None if it has none
    configs: tuple[str | None, ...] = (None,)  # its configurations, one after another


def instructed(row: Row) -> Example:
    """Alpaca's form: instruction, output and perhaps input."""
    template = WITH_INPUT if row.get("input") else INSTRUCTION
    question = template.format(instruction=text_of(row, "instruction"), input=row.get("input"))
    return Example(question, text_of(row, "output"), formatted=True)


def _problem(question: str, answer: str, ending: str = "") -> Callable[[Row], Example]:
    """A mathematical problem, from these columns."""
    return lambda row: Example(INSTRUCTION.format(instruction=row[question]) + ending, row[answer], formatted=True)


def _glue(task: str, first: str, second: str = "", score: str = "label", held_out: str = "validation") -> Source:
    """A task of GLUE, whose held-out labels are those of its validation split."""

    def example(row: Row) -> Example:
        return labeled(row[first], row["label"], row[second] if second else "")

    return Source("nyu-mll/glue", example, score, held_out=held_out, configs=(task,))


NAMED = {
    "metamathqa": Source(
        "meta-math/MetaMathQA", _problem("query", "response"), "boxed", train="train[:50000]", held_out=None
    ),
    "gsm8k": Source("openai/gsm8k", _problem("question", "answer", STEP_BY_STEP), "number", configs=("main",)),
    "math": Source(
        "EleutherAI/hendrycks_math", _problem("problem", "solution", STEP_BY_STEP), "boxed", configs=MATH_SUBJECTS
    ),
    "commonsense170k": Source("zwhe99/commonsense_170k", instructed, "choice", held_out=None),
    "cola": _glue("cola", "sentence", score="matthews"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2"),
    "sst2": _glue("sst2", "sentence"),
    "qnli": _glue("qnli", "question", "sentence"),
    "mnli": _glue("mnli", "premise", "hypothesis", held_out="validation_matched"),
    "qqp": _glue("qqp", "question1", "question2", score="f1"),
    "wnli": _glue("wnli", "sentence1", "sentence2"),
    "stsb": _glue("stsb", "sentence1", "sentence2", score="pearson"),
}


def read_data(name: str, score: str, held_out: bool = False, adapter_column: str | None = None) -> list[Example]:
    """The examples of a JSONL file, of a JSON list in Alpaca's form, or of a named data set."""
    source = _file_or_source(name)
    if isinstance(source, Path):
        examples = _records(source, adapter_column) if source.suffix == ".json" else read_jsonl(source, adapter_column)
        score = _score_of_labels(examples) if score == "exact" else score
        return [replace(example, source=name, score=score) for example in examples]
    split = source.held_out if held_out else source.train
    if split is None:
        raise ValueError(f"{name} has no held-out split: name another set, or leave --eval-data out")
    return [
        replace(with_adapter(source.example(row), row, adapter_column, name), source=name, score=source.score)
        for row in _rows(name, source, split)
    ]


def check_names(settings: Settings) -> None:
    """Raise a ValueError for a file or name of `--data` and `--eval-data` that is not there; reads nothing."""
    for name in (settings.data or "", *(settings.eval_data or "").split(",")):
        if name.strip():
            _file_or_source(name.strip())


def _file_or_source(name: str) -> Path | Source:
    if Path(name).is_file():
        return Path(name)
    if name not in NAMED:
        files = map(str, Path(name).parent.glob("*.json*"))
        hint = nearest(name, {*files, *NAMED}, f"data sets by name are {', '.join(NAMED)}", cutoff=0.6)
        raise ValueError(f"expected a JSONL file, found none at {name} in {Path.cwd()}{hint}")
    return NAMED[name]


def _score_of_labels(examples: list[Example]) -> str:
    """The default score of a file: equal texts or labels, or for values (2.5) their correlation."""
    labels = [example.label for example in examples]
    if None in labels:
        return "exact"
    return "pearson" if are_values(labels) else "label"


def _records(path: Path, adapter_column: str | None) -> list[Example]:
    """Alpaca's JSON list; JSON Lines in a file of this name do as well."""
    text = read_text(path)
    try:
        rows = parse_json(text, str(path))
    except ValueError:
        return read_jsonl(path, adapter_column)
    try:
        if not isinstance(rows, list) or not rows:
            raise TypeError(f"got {type(rows).__name__}" if rows else "it is empty")
        return [with_adapter(instructed(row), row, adapter_column, str(path)) for row in rows]
    except (TypeError, KeyError, AttributeError) as error:
        wanted = "a JSON list of objects with instruction and output, or a .jsonl file of prompt and completion"
        raise ValueError(f"{path}: expected {wanted} ({error})") from None


def _rows(name: str, source: Source, split: str) -> Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} is read from the hub as {source.path}: pip install datasets") from error
    try:
        parts = (datasets.load_dataset(source.path, config, split=split) for config in source.configs)
        return [row for part in parts for row in part]
    except Exception as error:  # the hub, the network and the cache raise types of their own
        why = " ".join(str(error).split())[:200]
        raise OSError(f"{name} cannot be read from the hub as {source.path}: {why}. A JSONL file works, too") from None
