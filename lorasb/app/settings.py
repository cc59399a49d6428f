"""Define all settings of a run once, for command-line options, YAML files (`--config`) and docs/settings.md."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from ..constants import DEFAULT_RANK, DOCS, MAX_RANK, UPDATES
from ..utils.atomic_files import write_text
from ..utils.checks import MAX_LR, check_pattern, nearest
from ..utils.reading import Json, read_text
from .scoring import SCORES

T = TypeVar("T")


def option(name: str) -> str:
    """Return a setting's name on the command line."""
    return "--" + name.replace("_", "-")


def check_rules(settings: Settings) -> None:
    """Check settings against the rules of their fields."""
    for item in fields(settings):
        value, rules = getattr(settings, item.name), item.metadata
        if value is None and item.default is None:
            continue
        if value is None:
            raise ValueError(f"{option(item.name)} needs a value, got auto: --lr, --epochs and --eta alone can be auto")
        if "choices" in rules and value not in rules["choices"]:
            raise ValueError(f"{option(item.name)} must be one of {', '.join(rules['choices'])}, got {value!r}")
        if rules.get("positive") and not 0 < value < math.inf:
            raise ValueError(f"{option(item.name)} must be positive, got {value!r}")
        if "check" in rules and not rules["check"][0](value):
            raise ValueError(f"{option(item.name)} {rules['check'][1]}, got {value!r}")


# A setting's `check`: a test for valid values, and the error text for others.
SHARE = (lambda value: 0 <= value < 1), "is a share in [0, 1)"
ENERGY = (lambda value: 0 < value <= 1), "is a share in (0, 1]"
RATE = (lambda value: 0 < value <= MAX_LR), f"must be positive, at most {MAX_LR:g}"
AT_LEAST_TWO = (lambda value: value >= 2), "must be at least 2"
SEED = (lambda value: 0 <= value < 2**32), "must be from 0 to 4294967295"  # numpy's range
NOT_NEGATIVE = (lambda value: value >= 0), "must not be negative"
BITS = (lambda value: value in (4, 16)), "must be 4 or 16"
RANKS = (lambda value: all(rank > 0 for rank in value.values())), "must have positive ranks"
SAVE_STEPS = (lambda value: re.fullmatch(r"auto|0*[1-9]\d*", value)), "must be auto or a positive number of steps"
FOLDER = str.strip, "has to name a folder"  # "" would be the current folder, and a run deletes its folder's checkpoints


def targets(value: str | None) -> str | list[str]:
    """Convert `--target-modules` to PEFT's target_modules: "all-linear", a list of names, or a regular expression."""
    if value is None or value == "all-linear":
        return "all-linear"
    names = [name.strip() for name in value.split(",")]
    return names if all(re.fullmatch(r"[\w.-]+", name) for name in names) else value


def check_layers(settings: Settings) -> None:
    """Raise a ValueError for an unusable model, target layers or ranks."""
    model = settings.model
    # Otherwise the hub would report the path as an invalid id.
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().is_dir():
        moved = "" if settings.basis is None else f"; if the model of {settings.basis} was moved, pass its new folder"
        like = "a hub id looks like HuggingFaceTB/SmolLM2-135M"
        raise ValueError(f"--model {model}: there is no such folder; {like}{moved}")
    if Path(model).expanduser().joinpath("adapter_config.json").is_file():
        raise ValueError(f"--model {model} is an adapter: name its base model, or use `lorasb ask` on its run")
    if isinstance(pattern := targets(settings.target_modules), str):
        check_pattern(pattern, "--target-modules")
    largest = max(settings.r or 0, *(settings.rank_pattern or {}).values(), 0)
    if settings.method != "lora" and largest > MAX_RANK:  # plain LoRA has no such limit
        raise ValueError(f"--r must be at most {MAX_RANK}, got {largest}: the kernels support no larger rank")


def check_packages(settings: Settings) -> None:
    """Raise an ImportError if a setting needs a package that is not installed."""
    report = settings.report_to
    if settings.score == "symbolic" and importlib.util.find_spec("math_verify") is None:
        raise ImportError("--score symbolic needs math-verify: pip install 'lorasb[math]'")
    if report != "none" and importlib.util.find_spec(report) is None:
        raise ImportError(f"--report-to {report} needs a package that is not installed: pip install {report}")
    if settings.rl is not None and importlib.util.find_spec("trl") is None:
        raise ImportError("--rl trains with TRL, which is not installed: pip install trl")


def check_reinforcement(settings: Settings) -> None:
    """Raise a ValueError for settings that cannot be combined with --rl."""
    if settings.generations < 2 or settings.usual_batch % settings.generations:
        more = f"take a multiple of --generations ({settings.generations}), which has to be 2 or more"
        raise ValueError(f"--batch-size {settings.usual_batch} counts completions with --rl: {more}")
    if settings.rl == "verifier" and settings.data is not None:
        raise ValueError("--rl verifier is a generated task's own reward: with --data take exact, or FILE.py:FUNCTION")
    if settings.rl_start == "rewards" and settings.method != "lora-sb":
        raise ValueError(f"--rl-start rewards requires --method lora-sb, got {settings.method}: leave it out")
    if settings.sampler is not None and settings.basis is None:
        raise ValueError(f"--sampler needs --basis: start the server with LORASB_BASIS=BASIS ({DOCS}/serving.md)")
    for name in ("packing", "find_lr", "adapter_column"):
        if getattr(settings, name):
            raise ValueError(f"{option(name)} cannot be combined with --rl, which samples completions: leave one out")


def check_adapters(settings: Settings) -> None:
    """Raise a ValueError for settings that adapters trained together do not support."""
    if settings.data is None:
        raise ValueError("--adapter-column names a column of --data, which is not given: name a file")
    refused = {
        "--method lora": settings.method == "lora",
        "--lora-dropout": settings.lora_dropout > 0,
        "--packing": settings.packing,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"--adapter-column mixes adapters in a batch and excludes {name}: leave one of them out")


def check_basis(settings: Settings) -> None:
    """Raise a ValueError for settings that the basis already fixes."""
    default = Settings()
    for name in ("method", "r", "rank_pattern", "target_modules", "update", "start", "eta", "rl_start", "lora_dropout"):
        if (value := getattr(settings, name)) != getattr(default, name):
            got = f"{option(name)} {value}"
            raise ValueError(f"--basis already fixes layers, ranks, A, B and R's start, got {got}: leave it out")


EMBEDDED = "smollm2-135m"  # the model in a PyPI package, see `prepare.demo_model`
DEFAULT_RATE = 2e-3  # used if no rate is given or measured
# Default rates with --rl: RL_RATE / r, or RL_RATE_OF_LORA. The best rates in benchmarks/research/results/rl.csv are
# 1e-2, 6.25e-4 and 1e-4 at r = 2, 8 and 64; four times these rates lower the share of right greedy answers from 0.506
# to 0.348, 0.468 and 0.444.
RL_RATE, RL_RATE_OF_LORA = 6.4e-3, 2.5e-4
DTYPES = ("auto", "bfloat16", "float32", "float16")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
TASKS: dict[str, dict[str, int]] = {  # options of reasoning-gym's data sets
    "word_sequence_reversal": {"min_words": 3, "max_words": 6},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"max_animals": 3, "max_instances": 9},
    "family_relationships": {},
    "gcd": {"max_value": 99},
}
DEFAULT_TASK = "word_sequence_reversal"
BATCH_SIZE = 16  # used if none is given
ENOUGH_STEPS, MOST_EPOCHS = 60, 20  # of --epochs auto: with fewer steps a small data set is not learned
PATHS = ("data", "eval_data", "basis", "resume", "output", "cache")  # paths; `resolve_model` expands --model
REWARDS = ("verifier", "exact")  # values of --rl; anything else names the user's code
# transformers' schedules that need no extra arguments
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def setting(group: str, default: T, text: str, *, init: bool = False, shown: str | None = None, **rules: object) -> T:
    """Return a dataclass field for a setting under the heading `group`; with `init`, `lorasb init` has it too."""
    # the option and its documentation are generated from the metadata
    return field(default=default, metadata={"help": text, "group": group, "init": init, "shown": shown, **rules})


MODEL, INIT = partial(setting, "model", init=True), partial(setting, "initialization", init=True)
DATA, RL, ADAPTER = partial(setting, "data"), partial(setting, "reinforcement"), partial(setting, "adapter")
TRAINING, RUN = partial(setting, "training"), partial(setting, "run")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; saved in its config.yaml and its summary."""

    model: str = MODEL(EMBEDDED, "Model folder or Hugging Face Hub ID.")
    dtype: str = MODEL(
        "auto", f"{', '.join(DTYPES)}; auto picks bfloat16 where hardware supports it, else float32.", choices=DTYPES
    )
    bits: int = MODEL(16, "Bits per weight of the base model: 16, or 4 (NF4, double quantization).", check=BITS)
    task: str | None = DATA(
        None, f"Task to generate when --data is not given: {', '.join(TASKS)}.", init=True, shown=DEFAULT_TASK
    )
    data: str | None = DATA(
        None,
        "JSONL with prompt/completion, messages or text/label, Alpaca JSON, or a data set's name (docs/data.md).",
        init=True,
    )
    eval_data: str | None = DATA(
        None, "Held-out data in the same formats; separate several with commas.", shown="a tenth of --data"
    )
    adapter_column: str | None = DATA(None, "Column of --data that names each row's adapter; all share one basis.")
    train_examples: int = DATA(1000, "Number of training examples to generate.", init=True, positive=True)
    eval_examples: int = DATA(100, "Maximum number of held-out examples from each set.", positive=True)
    score: str = DATA("exact", f"How to score answers: {', '.join(SCORES)} (docs/data.md).", choices=tuple(SCORES))
    template: str = DATA(
        "auto",
        "auto applies the tokenizer's chat template if it has one; none leaves prompts unchanged.",
        init=True,
        choices=("auto", "none"),
    )
    max_new_tokens: int | None = DATA(
        None, "Maximum number of tokens per answer.", positive=True, shown="longest right answer + 4"
    )
    max_length: int = DATA(512, "Maximum number of tokens per example.", init=True, check=AT_LEAST_TWO)
    packing: bool = DATA(False, "Pack short examples into rows of --max-length tokens; --batch-size counts rows.")
    rl: str | None = RL(
        None, "Train with GRPO on this reward: verifier (of --task), exact (by --score), or FILE.py:FUNCTION."
    )
    generations: int = RL(8, "Completions per prompt with --rl; --batch-size counts completions.", positive=True)
    rl_start: str = RL(
        "examples",
        "Start of R for --rl: the first step on examples, the first step on rewards, or zero.",
        choices=("examples", "rewards", "zero"),
    )
    sampler: str | None = RL(
        None, "URL of a vLLM server that serves --basis: it samples for --rl and receives R after every step."
    )
    temperature: float = RL(1.0, "Sampling temperature for --rl.", positive=True)
    method: str = ADAPTER(
        "lora-sb", "Adapter method: lora-sb, lora-xs, or PEFT's lora.", choices=("lora-sb", "lora-xs", "lora")
    )
    r: int | None = ADAPTER(
        None,
        "Rank, at most 256. Use --rank under torchrun, which reserves --r.",
        init=True,
        positive=True,
        also=("--rank",),
        shown="64, less in smaller layers; lora: 32",
    )
    target_modules: str | None = ADAPTER(
        None, "Layers to adapt: comma-separated names or a regular expression.", init=True, shown="all-linear"
    )
    rank_pattern: dict[str, int] | None = ADAPTER(  # noqa: RUF009
        None, "Ranks for specific layers: down_proj=96,q_proj=32, or JSON.", init=True, check=RANKS
    )
    basis: str | None = ADAPTER(None, "Folder of a basis (`lorasb basis make`) with A and B; only R is trained.")
    lora_dropout: float = ADAPTER(0.0, "Dropout probability on the adapter's input.", check=SHARE)
    samples: int | None = ADAPTER(
        None, "Number of samples for the initialization.", init=True, positive=True, shown="max(32, n/1000)"
    )
    update: str = ADAPTER(
        "adamw", "First step to simulate: adamw (signs), sgd, or per-sample (moments).", init=True, choices=UPDATES
    )
    start: str = ADAPTER(
        "limited",
        "Start of R: the full first step (paper), at most four optimizer steps (limited, tuned on chain_sum), or zero.",
        init=True,
        choices=("limited", "paper", "zero"),
    )
    eta: float | None = ADAPTER(
        None, "Learning rate η of the first step.", init=True, check=RATE, shown="--lr divided by warm-up steps"
    )
    lr: float | None = TRAINING(
        None,
        f"Peak learning rate; auto measures it for LoRA-SB, and is {DEFAULT_RATE:g} with --eta or another method, "
        f"{RL_RATE:g} / r with --rl.",
        check=RATE,
        shown="auto",
        init=True,
        also=("--learning-rate",),
    )
    find_lr: bool = TRAINING(False, "Search for the learning rate by 12-step trials on the data, starting at --lr.")
    epochs: float | None = TRAINING(
        None,
        f"Passes over the training data; auto makes at least {ENOUGH_STEPS} steps (per adapter), but at most "
        f"{MOST_EPOCHS} passes.",
        positive=True,
        init=True,
        shown="auto",
    )
    batch_size: int | None = TRAINING(
        None,
        "Examples per training step, across all processes.",
        init=True,
        positive=True,
        shown=f"{BATCH_SIZE}, or a third of the examples if fewer than {BATCH_SIZE * 3}",
    )
    gradient_accumulation: int = TRAINING(1, "Number of micro-batches that a step is split into.", positive=True)
    gradient_checkpointing: bool = TRAINING(False, "Recompute activations in the backward pass to save memory.")
    scheduler: str = TRAINING("linear", f"Learning rate schedule: {', '.join(SCHEDULERS)}.", choices=SCHEDULERS)
    warmup: float = TRAINING(0.1, "Fraction of the training steps used for warm-up.", init=True, check=SHARE)
    weight_decay: float = TRAINING(0.0, "AdamW weight decay.", check=NOT_NEGATIVE)
    seed: int = TRAINING(0, "Random seed for data, initialization and training.", init=True, check=SEED)
    eval_steps: int | None = RUN(
        None, "Compute the held-out loss every N steps.", positive=True, shown="before and after training only"
    )
    save_steps: str = RUN("auto", "Save a checkpoint every N steps; auto loses at most ten minutes.", check=SAVE_STEPS)
    resume: str = RUN(
        "auto", "auto (resume the run in --output), never (start over), or a checkpoint folder to resume from."
    )
    report_to: str = RUN("none", "Where to log: none, tensorboard or wandb.", choices=("none", "tensorboard", "wandb"))
    output: str = RUN("runs/finetune", "Folder for all files of the run.", init=True, check=FOLDER)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))  # the class is frozen
        for name in PATHS:  # "~" in YAML and in --output=~/runs, which shells do not expand
            if value := getattr(self, name, None):
                parts = (os.path.expanduser(part.strip()) if "~" in part else part for part in value.split(","))
                object.__setattr__(self, name, ",".join(parts))

    @property
    def usual_batch(self) -> int:
        """Examples per step, unless the data set is too small for that."""
        return self.batch_size or BATCH_SIZE

    @property
    def generated_task(self) -> str:
        """Task whose examples are generated if there is no --data."""
        return self.task or DEFAULT_TASK

    def check(self) -> None:
        """Raise a ValueError for an invalid value or an invalid combination of values."""
        check_rules(self)
        check_layers(self)
        if self.task is not None and self.data is not None:
            raise ValueError(f"--task {self.task} names generated examples, and --data names other ones: leave one out")
        self.check_processes()
        if self.data is None and self.eval_data is not None:
            raise ValueError("--eval-data needs --data, which is not given: name a file of examples to train on")
        if self.adapter_column is not None:
            check_adapters(self)
        if self.basis is not None:
            check_basis(self)
        if self.rl is not None:
            check_reinforcement(self)
        elif self.sampler is not None:
            raise ValueError("--sampler samples completions for --rl: name a reward with it, such as --rl exact")
        check_packages(self)

    def default_rate(self, r: int | None) -> float:
        """Return the peak learning rate for rank r if none is given or measured."""
        if self.rl is None:
            return DEFAULT_RATE
        return RL_RATE_OF_LORA if self.method == "lora" else RL_RATE / (r or DEFAULT_RANK)

    @property
    def prompts_per_step(self) -> int:
        """Number of prompts per step with `--rl`, where the batch size counts completions."""
        return self.usual_batch // self.generations

    def check_processes(self, processes: int = 1) -> None:
        """Raise a ValueError if the batch size is not divisible by the number of processes times accumulations."""
        parts = self.gradient_accumulation * processes
        if self.usual_batch % parts:
            where = f" times {processes} processes" if processes > 1 else ""
            by = f"--gradient-accumulation {self.gradient_accumulation}{where}"
            raise ValueError(f"--batch-size {self.usual_batch} is not divisible by {by}: take a multiple of {parts}")


@dataclass(frozen=True)
class InitSettings(Settings):
    """Settings of `lorasb init`: some of `lorasb finetune`'s, and additional ones."""

    output: str = RUN("runs/init", "Folder for all files of the run.", init=True, check=FOLDER)
    strategy: str = INIT("auto", "How to sum gradients: layerwise (by block), accumulate (entire model), or auto.")
    memory_budget: str | None = INIT(
        None, "Memory limit beyond the model, e.g. 6GB.", shown="a training step of 32 samples"
    )
    cache: str | None = INIT(None, "File to save the gradients' signs in, for later initializations at any rank.")
    stability: bool = INIT(False, "Also compare the subspaces of two halves of the samples.")
    energy: float | None = INIT(None, "Suggest ranks that keep this share of sign(G), up to 1.", check=ENERGY)
    parameters: int | None = INIT(None, "Suggest ranks with this many trained parameters in total.", positive=True)


def listed(kind: type[Settings]) -> Iterator[tuple[Field, object]]:
    """Yield the settings of a command's dataclass, each with its type (None removed)."""
    # annotations are strings here (`from __future__ import annotations`); get_type_hints evaluates them
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.metadata["init"] or kind is Settings:
            hint = hints[item.name]
            parts = get_args(hint)
            yield item, next(part for part in parts if part is not type(None)) if type(None) in parts else hint


def shown_default(item: Field) -> str:
    """Return a field's default as text for help and documentation."""
    if item.metadata["shown"]:
        return str(item.metadata["shown"])
    if isinstance(item.default, bool):
        return "on" if item.default else "off"
    if isinstance(item.default, float):
        return f"{item.default:g}"
    return "none" if item.default is None else str(item.default)


def as_name(written: object) -> str:
    """Return the Python name of a setting that may be written as an option."""
    return str(written).removeprefix("--").replace("-", "_")


CONFIG_NAME = "config.yaml"
PRESETS = {file.stem: file for file in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
ALIASES = {as_name(alias): one.name for one, _ in listed(Settings) for alias in one.metadata.get("also", ())}
AUTO = tuple(one.name for one, kind in listed(Settings) if kind is float and one.default is None)  # can be auto
# type of a setting -> its name in messages, and the types accepted for a value (YAML 1.1 reads 2e-3 as text)
TYPES: dict[object, tuple[str, type | UnionType]] = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", int | float | str),
    str: ("a text", str | int),
}


def read_config(path: str | Path, kind: type[Settings] = Settings) -> Json:
    """Read the settings in a YAML file, by name."""
    import yaml  # imported here, as `lorasb --help` does not need it

    try:
        loaded = yaml.safe_load(read_text(path))
    except OSError as error:
        raise ValueError(f"--config {path}: expected a YAML file of settings ({error.strerror or error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path}: this is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected lines like `lr: 0.002`, got {type(loaded).__name__}")
    given: Json = {}
    known = {one.name: expected for one, expected in listed(kind)}
    for written, value in loaded.items():
        name = ALIASES.get(as_name(written), as_name(written))
        if name not in known:
            hint = nearest(as_name(written), {*known, *ALIASES})
            raise ValueError(f"--config {path}: there is no setting {written!r}{hint}")
        if name in given:
            raise ValueError(f"--config {path}: {written!r} is another name of {name!r}, which the file has too")
        if value is not None:  # a line without a value (`eval_data:`) means the default, like an omitted option
            given[name] = typed(value, known[name], f"--config {path}: {name}")
    return given


def combined(kind: type[Settings], options: Json, file: str | None, preset: str | None, allow_code: bool) -> Json:
    """Return settings by name: options override the --config file, which overrides the preset."""
    if preset and preset not in PRESETS:
        hint = nearest(preset, PRESETS, f"known are {', '.join(PRESETS)}", cutoff=0.4)
        raise ValueError(f"--preset {preset!r}: there is no such preset{hint}")
    values = read_config(PRESETS[preset]) if preset else {}
    values |= read_config(file, kind) if file else {}
    if values.get("task") == DEFAULT_TASK and (values.get("data") or options.get("data")):
        del values["task"]  # earlier versions wrote the default task even with --data
    if values.get("rl") not in (None, *REWARDS) and options.get("rl") is None and not allow_code:
        what = f"rl is {values['rl']}, and the run would execute that file"
        raise ValueError(f"--config {file}: {what}: add --allow-code if you trust it")
    types = {one.name: expected for one, expected in listed(kind)}
    return values | {name: typed(one, types[name], option(name)) for name, one in options.items() if one is not None}


def typed(value: object, kind: Any, where: str) -> Any:
    """Convert a value from YAML or the command line to its setting's type."""
    if kind not in TYPES:
        return _ranks(value, where)
    if kind is float and value == "auto":  # chosen from the data, e.g. --epochs
        return None
    if isinstance(value, TYPES[kind][1]) and isinstance(value, bool) == (kind is bool):  # bool is a subclass of int
        with suppress(ValueError):
            return kind(value)
    what = TYPES[kind][0] + (" or auto" if where.endswith(AUTO) else "")
    raise ValueError(f"{where} expects {what}, got {value!r}")


def _ranks(value: object, where: str) -> dict[str, int]:
    """Parse ranks by layer name from a mapping, JSON, or name=rank,name=rank."""
    ranks = value
    with suppress(ValueError):
        if isinstance(value, str):
            pairs = (part.partition("=") for part in value.split(","))
            ranks = json.loads(value) if value.lstrip().startswith("{") else {n: int(r) for n, _, r in pairs}
        if isinstance(ranks, dict) and all(isinstance(rank, int) and str(name) for name, rank in ranks.items()):
            return {str(name).strip(): rank for name, rank in ranks.items()}
    raise ValueError(f"{where} expects ranks by name, like down_proj=96,q_proj=32 or JSON, got {value!r}")


def write_config(path: Path, settings: Settings) -> None:
    """Write settings as YAML for `--config`, atomically."""
    import yaml

    # without --resume, which applies to one start of a run only
    values = {one.name: getattr(settings, one.name) for one, _ in listed(type(settings)) if one.name != "resume"}
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
