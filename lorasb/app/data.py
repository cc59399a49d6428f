"""Generate a run's examples by reasoning-gym, or read files or named data sets; hold some out; compute a digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..constants import BASE_ROW
from ..utils.checks import nearest
from ..utils.reading import Json, parse_json, read_text
from .settings import TASKS, Settings

# reasoning-gym draws item i of a data set from seed + i, so the held-out set needs a seed far from the training set's.
HELD_OUT_SEED = 10_000_000
MAX_LABEL = 3e38  # about the largest fp32 number
# An adapter's name is also a folder name and part of parameter names, so it has no dots.
ADAPTER_NAME, TAKEN_NAMES = r"[\w@+][\w@+-]{0,59}", ("default", BASE_ROW)
MAX_DRAWS = 20  # per example, before a task counts as having too few
QUESTION_ONLY = ("word_sequence_reversal", "leg_counting")  # drop the instructions, which every question repeats
Row = Json  # one row of a file or data set
T = TypeVar("T")
Label = str | int | float


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; a chat in `messages`, which ends with the completion; or a text and its label."""

    prompt: str  # or the labeled text
    completion: str  # or the label as text
    messages: tuple[dict[str, str], ...] = ()  # each with role and content
    pair: str = ""  # second text of a labeled pair
    label: Label | None = None  # class, or value (a float); None for language modeling
    source: str = ""  # name of the data set
    score: str = "exact"  # how an answer is scored, see `scoring`
    adapter: str = ""  # name of the adapter that learns this example (`--adapter-column`)
    formatted: bool = False  # the prompt already has a format (Alpaca's): apply no chat template


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no held-out prompt is in the training set."""
    if settings.data is None:
        task = settings.generated_task
        held_out = generate(task, settings.eval_examples, HELD_OUT_SEED + settings.seed)
        train = generate(task, settings.train_examples, settings.seed, exclude=held_out)
        train, held_out = ([replace(one, score=settings.score) for one in part] for part in (train, held_out))
        return train, held_out
    train_examples = read_data(settings.data, settings.score, adapter_column=settings.adapter_column)
    if not settings.eval_examples:
        return train_examples, []
    hold_out = _hold_out_at_random if settings.eval_data is None else _hold_out_eval_data
    remaining, held_out = hold_out(settings, train_examples)
    if not remaining or not held_out:
        count, prompts = len(train_examples), len(set(map(question_key, train_examples)))
        why = f"one prompt in all of its {count} rows" if prompts == 1 < count else "too few examples"
        raise ValueError(
            f"{settings.data} has {why}: add others to hold some out, or name held-out rows by --eval-data"
        )
    return remaining, held_out


def _not_held_out(examples: list[Example], held_out: list[Example]) -> list[Example]:
    """Return the examples whose prompt is not held out: duplicates must not be trained on either."""
    prompts = {question_key(example) for example in held_out}
    return [example for example in examples if question_key(example) not in prompts]


def question_key(example: Example) -> str:
    """Return a key of an example's question, whatever the answer; a text without a prompt is its own key."""
    turns = example.messages[:-1]
    text = "" if example.prompt.strip() or turns else example.completion
    return json.dumps([example.prompt, example.pair, turns, example.adapter, text])  # dictionaries have no hash


def _hold_out_eval_data(settings: Settings, train_examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return the training examples not in `--eval-data`, and up to `eval_examples` random ones per set of it."""
    names = [name.strip() for name in (settings.eval_data or "").split(",") if name.strip()]
    if not names:
        raise ValueError(f"--eval-data names no file: {settings.eval_data!r}")
    # held-out values that are all whole numbers would be taken for labels
    score = "pearson" if train_examples[0].score == "pearson" else settings.score
    parts = [read_data(name, score, True, settings.adapter_column) for name in names]
    most = settings.eval_examples
    drawn = (part if len(part) <= most else _shuffled(part, settings.seed)[:most] for part in parts)
    held_out = [example for part in drawn for example in part]
    known, remaining = {example.adapter for example in train_examples}, _not_held_out(train_examples, held_out)
    asked = {example.adapter for example in held_out}
    if strangers := sorted(asked - known):
        hint = nearest(strangers[0], known, f"{len(strangers)} in all", cutoff=0.6)
        raise ValueError(f"{settings.eval_data} has rows of adapter {strangers[0]!r}, and --data has none of it{hint}")
    if untrained := sorted(asked - {example.adapter for example in remaining}):
        whose = f" of adapter {untrained[0]!r}" if untrained[0] else ""
        raise ValueError(
            f"{settings.eval_data} has every prompt of --data{whose}: name rows that are not to be trained on"
        )
    return remaining, held_out


def _hold_out_at_random(settings: Settings, train_examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Hold out up to a tenth of the examples at random; return the remaining and the held-out ones."""
    by_prompt: dict[str, list[Example]] = {}
    for example in train_examples:
        by_prompt.setdefault(question_key(example), []).append(example)
    count = max(1, min(settings.eval_examples, len(train_examples) // 10))
    held_out: list[Example] = []
    for rows in _shuffled(list(by_prompt.values()), settings.seed):  # all rows of a prompt, or none
        held_out += rows if len(held_out) + len(rows) <= count else []
    held_out = held_out or min(by_prompt.values(), key=len)[:count]
    remaining = _not_held_out(train_examples, held_out)
    # An adapter must not lose all its examples to the held-out set.
    known = {example.adapter for example in remaining}
    if any(example.adapter not in known for example in held_out):
        held_out = [example for example in held_out if example.adapter in known]
        remaining = _not_held_out(train_examples, held_out)
    return remaining, held_out


def _shuffled(rows: Sequence[T], seed: int) -> list[T]:
    """Shuffle by the seed alone, so that a resumed run holds out the same."""
    import torch  # here, as `lorasb --help` does not need it

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]


def digest(*parts: Sequence[Example]) -> str:
    """Return a SHA-256 over lists of examples, in order; it does not depend on the file's path."""
    text = json.dumps([[astuple(replace(example, source="")) for example in part] for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


def generate(task: str, count: int, seed: int, exclude: Sequence[Example] = ()) -> list[Example]:
    """Generate `count` examples of a reasoning-gym task with distinct prompts, none of them in `exclude`."""
    seen = {example.prompt for example in exclude}
    examples: list[Example] = []
    if not count:
        return examples
    for item in data_set(task, count * MAX_DRAWS, seed):
        prompt = item["question"].strip()
        if task in QUESTION_ONLY:
            prompt = prompt.rpartition("\n\n")[2]
        if prompt not in seen:
            seen.add(prompt)
            examples.append(Example(prompt, str(item["answer"]).strip()))
        if len(examples) == count:
            return examples
    raise ValueError(f"task {task!r} gave {len(examples)} distinct prompts, {count} were asked for: ask for fewer")


def data_set(task: str, count: int, seed: int) -> Any:
    """reasoning-gym's data set of a task."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}, or give --data a JSONL file")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("generated tasks need reasoning-gym: pip install 'lorasb[demo]'") from error
    return reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task])


def read_jsonl(path: str | Path, adapter_column: str | None = None) -> list[Example]:
    """Read examples: JSON objects, one per line or in a list, in a form that `_example` knows."""
    text = read_text(path)
    rows: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("["):
        rows = ((f"row {number}", row) for number, row in enumerate(parse_json(text, str(path)), start=1))
    else:  # not splitlines(): it also splits at U+2028 and others, which may be unescaped in JSON strings
        rows = ((f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    examples = [_read_row(row, f"{path}, {place}", adapter_column) for place, row in rows]
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def _read_row(row: Any, where: str, adapter_column: str | None) -> Example:
    """Convert an object, or a line of JSON, to an example."""
    try:
        values = parse_json(row, "") if isinstance(row, str) else row
        example = _example(values)
    except KeyError as error:
        why = f"it has {', '.join(values) or 'nothing'}, but no {error}"
    except (ValueError, TypeError) as error:
        why = str(error).removeprefix(": ")
    else:
        return with_adapter(example, values, adapter_column, where)
    forms = "prompt and completion, messages that end with the assistant's turn, text and label, or instruction and"
    raise ValueError(f"{where}: expected an object with {forms} output; {why}")


def _example(values: object) -> Example:
    if not isinstance(values, dict):
        raise TypeError(f"got {type(values).__name__}")
    if "label" in values and "text" in values:
        return labeled(text_of(values, "text"), values["label"], _optional_text(values, "text_pair"))
    if "messages" not in values:
        if "instruction" in values and "completion" not in values:
            return instructed(values)
        return Example(text_of(values, "prompt"), text_of(values, "completion"))
    if not isinstance(values["messages"], list):
        raise TypeError(f"messages has to be a list, got {type(values['messages']).__name__}")
    calls = (message.get("tool_calls") for message in values["messages"] if isinstance(message, dict))
    if values.get("tools") or any(calls):
        raise ValueError("tools and tool_calls are not read: write them into the content")
    messages = [{name: text_of(message, name) for name in ("role", "content")} for message in values["messages"]]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return Example(messages[-2]["content"], messages[-1]["content"], tuple(messages))


def text_of(values: Row, name: str) -> str:
    """Return an entry of an example as text; numbers are converted."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{name} has to be a text, got {str(value)[:60]!r} ({type(value).__name__})")
    if not isinstance(value, str) and not -MAX_LABEL <= value <= MAX_LABEL:  # NaN, Infinity, 1e400
        raise TypeError(f"{name} has to be a finite number, at most {MAX_LABEL:g}, got {value!r}")
    return str(value)


def _optional_text(values: Row, name: str) -> str:
    return "" if values.get(name) is None else text_of(values, name)


def with_adapter(example: Example, values: Row, column: str | None, where: str) -> Example:
    """Assign an example to the adapter that a column names."""
    if column is None:
        return example
    if column not in values:
        raise ValueError(f"{where}: there is no column {column} (--adapter-column), only {', '.join(values)}")
    from torch.nn import ParameterDict  # adapters are its entries; here, as `lorasb --help` does not need it

    value = values[column]
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if name in TAKEN_NAMES or hasattr(ParameterDict(), name) or not re.fullmatch(ADAPTER_NAME, name):
        taken = f"{' or '.join(TAKEN_NAMES)}, nor a dictionary's method"
        wanted = f"an adapter's name in {column}, of at most 60 letters, digits and _ - + @, not {taken}"
        raise ValueError(f"{where}: expected {wanted}, got {value!r}: write other characters as _")
    return replace(example, adapter=name)


def labeled(text: str, label: Label, pair: str = "") -> Example:
    """A text, or a pair of texts, with its label."""
    label = label.strip() if isinstance(label, str) else label  # answers are compared without surrounding spaces
    return Example(text, text_of({"label": label}, "label"), pair=pair, label=label, score="label")


def are_values(labels: Sequence[Label | None]) -> bool:
    """Return True if all labels are numbers and any is a float (2.5): values to learn, not classes."""
    return all(isinstance(label, int | float) for label in labels) and any(isinstance(v, float) for v in labels)


INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
STEP_BY_STEP = " Let's think step by step."  # MetaMathQA's authors end their evaluation prompts with it
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

    path: str  # hub id
    example: Callable[[Row], Example]  # from a row to an Example
    score: str  # how its answers are scored, see `scoring`
    train: str = "train"  # its training split, as `datasets.load_dataset` takes it
    held_out: str | None = "test"  # its held-out split; None if it has none
    configs: tuple[str | None, ...] = (None,)  # its configurations, concatenated


def instructed(row: Row) -> Example:
    """Convert a row in Alpaca's form: instruction, output and optionally input."""
    given = _optional_text(row, "input")
    template = WITH_INPUT if given else INSTRUCTION
    question = template.format(instruction=text_of(row, "instruction"), input=given)
    return Example(question, text_of(row, "output"), formatted=True)


def _problem(question: str, answer: str, ending: str = "") -> Callable[[Row], Example]:
    """Return a function that makes a math problem from these columns."""
    return lambda row: Example(INSTRUCTION.format(instruction=row[question]) + ending, row[answer], formatted=True)


def _glue(task: str, first: str, second: str = "", score: str = "label", held_out: str = "validation") -> Source:
    """Return a GLUE task; its validation split is held out."""

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
    """Read the examples of a JSON or JSONL file, or of a named data set."""
    source = _file_or_source(name)
    if isinstance(source, Path):
        examples = read_jsonl(source, adapter_column)
        labels = [example.label for example in examples]
        usual = "pearson" if are_values(labels) else "exact" if None in labels else "label"
    else:
        split = source.held_out if held_out else source.train
        if split is None:
            raise ValueError(f"{name} has no held-out split: name another set, or leave --eval-data out")
        rows, usual = _rows(name, source, split), source.score
        examples = [with_adapter(source.example(row), row, adapter_column, name) for row in rows]
    return [replace(example, source=name, score=usual if score == "exact" else score) for example in examples]


def check_names(settings: Settings) -> None:
    """Raise a ValueError if a file or data set of `--data` or `--eval-data` does not exist; read nothing."""
    for name in (settings.data or "", *(settings.eval_data or "").split(",")):
        if name.strip():
            _file_or_source(name.strip())


def _file_or_source(name: str) -> Path | Source:
    if name.lower().endswith((".csv", ".tsv")):
        raise ValueError(f"expected a JSONL file, got {name}: write each row as one line of JSON")
    if Path(name).is_file():
        return Path(name)
    if name not in NAMED:
        files = (path.name for path in Path(name).parent.glob("*.json*"))
        hint = nearest(Path(name).name, {*files, *NAMED}, f"named data sets are {', '.join(NAMED)}", cutoff=0.6)
        raise ValueError(f"expected a JSONL file, found none at {name} in {Path.cwd()}{hint}")
    return NAMED[name]


def _rows(name: str, source: Source, split: str) -> Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} is read from the hub as {source.path}: pip install datasets") from error
    try:
        parts = (datasets.load_dataset(source.path, config, split=split) for config in source.configs)
        return [row for part in parts for row in part]
    except Exception as error:  # the hub, the network and the cache raise various types
        why = " ".join(str(error).split())[:200]
        raise OSError(f"{name} cannot be read from the hub as {source.path}: {why}. A JSONL file works, too") from None
