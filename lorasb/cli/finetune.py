"""`lorasb finetune`: data, model, initialisation, `transformers.Trainer`, evaluation, and the files of a run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..init.run import UPDATES
from ..ops import current_backend
from .embedded import EMBEDDED, resolve_model
from .encode import Collator, Encoded, encode
from .evaluate import Evaluation, evaluate
from .tasks import HELD_OUT_SEED, Example, generate, read_jsonl

METHODS = ("lora-sb", "lora-xs", "lora")
LORA_RANK = 32  # the rank that the paper compares with
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; written into its summary."""

    model: str = EMBEDDED
    task: str = "word_sequence_reversal"
    data: str | None = None
    eval_data: str | None = None
    method: str = "lora-sb"
    r: int | None = None
    lr: float = 2e-3
    epochs: float = 1.0
    batch_size: int = 16
    warmup: float = 0.1
    train_examples: int = 3600
    eval_examples: int = 100
    samples: int | None = None
    update: str = "adamw"
    max_length: int = 512
    dtype: str = "bfloat16"
    bits: int = 16
    seed: int = 0
    output: str = "runs/finetune"

    def check(self) -> None:
        """Raise a ValueError for a value that no run can have."""
        for name, choices in (("method", METHODS), ("dtype", tuple(DTYPES)), ("update", UPDATES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("r", "lr", "epochs", "batch_size", "train_examples", "eval_examples", "samples", "max_length"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)!r}")
        if self.bits not in (4, 16):
            raise ValueError(f"--bits must be 4 or 16, got {self.bits!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup is a share of the steps in [0, 1), got {self.warmup!r}")
        current_backend()  # an unusable LORASB_BACKEND is better met now than after the first evaluation


@dataclass
class Run:
    """A run in progress."""

    settings: Settings
    tokenizer: Any
    model: Any
    train: list[Example]
    held_out: list[Example]
    train_ids: list[Encoded]
    held_out_ids: list[Encoded]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, math.ceil(-(-len(self.train_ids) // self.settings.batch_size) * self.settings.epochs))

    @property
    def warmup_steps(self) -> int:
        return round(self.settings.warmup * self.steps)

    def evaluate(self, title: str) -> Evaluation:
        """Held-out loss, accuracy and answers of the model as it is now."""
        batch = 2 * self.settings.batch_size
        return evaluate(self.model, self.tokenizer, self.held_out, self.held_out_ids, batch, title)


@dataclass(frozen=True)
class Result:
    """What a run gave: its summary (as in summary.json), the answers before and after, the report of its init."""

    summary: dict[str, Any]
    examples: list[Example]
    before: Evaluation
    after: Evaluation
    report: Any


def run_finetune(settings: Settings) -> Result:
    """Fine-tune, evaluate before and after, and write the run's files into `settings.output`.

    Files: adapter/, lora/ (the exact plain LoRA), report.json, loss.png, energy.png, summary.json. With
    method="lora" there is no export (it is a LoRA already) and no report.

    Raises:
        ValueError: bad settings or data.
    """
    settings.check()
    run = prepare(settings)
    before = run.evaluate("held-out problems, before")
    report, init_seconds = adapt(run)
    history, seconds, tokens = train(run)
    after = run.evaluate("held-out problems, after")
    summary = _summary(run, before, after, init_seconds, seconds, tokens)
    summary["train_losses"] = [entry["loss"] for entry in history if "loss" in entry]
    save(run, report, history, summary)
    return Result(summary, run.held_out, before, after, report)


def prepare(settings: Settings) -> Run:
    """Load the model, make or read the examples, and tokenise them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(settings.seed)
    folder = resolve_model(settings.model)
    train_examples, held_out = load_examples(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[settings.dtype])
    except OSError as error:
        raise ValueError(f"cannot load --model {settings.model!r}, expected a folder or hub id: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if settings.bits == 4:
        import lorasb

        lorasb.quantize(model, "nf4", nested=True)
    contiguous_head(model)
    encoded = [[encode(e, tokenizer, settings.max_length) for e in part] for part in (train_examples, held_out)]
    return Run(settings, tokenizer, model, train_examples, held_out, *encoded)


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no held-out prompt is in the training set.

    Raises:
        ValueError: files without examples, or nothing left to train on.
    """
    if settings.data is None:
        held_out = generate(settings.task, settings.eval_examples, HELD_OUT_SEED + settings.seed)
        return generate(settings.task, settings.train_examples, settings.seed, exclude=held_out), held_out
    train_examples = read_jsonl(settings.data)
    if settings.eval_data is not None:
        held_out = read_jsonl(settings.eval_data)[: settings.eval_examples]
    else:
        order = torch.randperm(len(train_examples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        share = max(1, min(settings.eval_examples, len(train_examples) // 10))
        held_out = [train_examples[i] for i in order[:share]]
    prompts = {(example.prompt, example.messages) for example in held_out}
    left = [example for example in train_examples if (example.prompt, example.messages) not in prompts]
    if not left:
        raise ValueError(f"{settings.data} holds no example that is not held out: pass more, or --eval-data of its own")
    return left, held_out


def adapt(run: Run, **options: Any) -> tuple[Any, float]:
    """Put the adapter in and initialise it; returns the report (None for plain LoRA) and the seconds it took.

    `options` go to `lorasb.initialize`.
    """
    import peft

    import lorasb

    settings, started = run.settings, time.perf_counter()
    if settings.method == "lora":
        r = settings.r or LORA_RANK
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
        run.model = peft.get_peft_model(run.model, config)
        return None, 0.0
    init = "lora-xs" if settings.method == "lora-xs" else "update"
    run.model = lorasb.patch(run.model, r=settings.r, init=init, init_seed=settings.seed)
    if init == "lora-xs":
        return _described(run, run.model.base_model.init_reports["default"]), time.perf_counter() - started
    loader: Any = torch.utils.data.DataLoader(
        _Listed(run.train_ids),
        batch_size=settings.batch_size,
        collate_fn=Collator(run.tokenizer.pad_token_id, run.model.get_base_model()),
    )
    eta = lorasb.first_step_lr(settings.lr, run.warmup_steps)
    options |= {"num_samples": settings.samples, "update": settings.update, "seed": settings.seed}
    report = lorasb.initialize(run.model, loader, lr=eta, **options)
    return _described(run, report), time.perf_counter() - started


def _described(run: Run, report: Any) -> Any:
    """The report, after the adapter's configuration was given the name of its data."""
    config = run.model.peft_config["default"]
    config.init_provenance["data"] = _describe_data(run.settings, len(run.train_ids))
    return report


def train(run: Run) -> tuple[list[dict[str, Any]], float, int]:
    """Train with `transformers.Trainer`; returns its log, the seconds it took and the tokens it saw."""
    from transformers import Trainer, TrainingArguments

    settings = run.settings
    scratch = Path(settings.output) / "trainer"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        warmup_steps=run.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,
    )
    collate = Collator(run.tokenizer.pad_token_id, run.model.get_base_model())
    trainer = Trainer(model=run.model, args=arguments, train_dataset=_Listed(run.train_ids), data_collator=collate)
    _quiet_logs(trainer)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    shutil.rmtree(scratch, ignore_errors=True)
    return trainer.state.log_history, seconds, round(sum(map(len, run.train_ids)) * settings.epochs)


class _Listed(torch.utils.data.Dataset):
    """A list as a map-style data set."""

    def __init__(self, items: Sequence[Encoded]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]


def _quiet_logs(trainer: Any) -> None:
    """Keep the progress bar and drop the dictionaries that Trainer prints at every step."""
    from transformers import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)


def contiguous_head(model: nn.Module) -> None:
    """Hand the head a contiguous slice of hidden states.

    With `logits_to_keep` the slice is a strided view, for which torch multiplies sample by sample on CPUs and copies
    the head's weight for each: 0.7 s of a 1.4 s step of SmolLM2.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def _describe_data(settings: Settings, count: int) -> str:
    if settings.data is not None:
        return f"{Path(settings.data).name}, {count} examples"
    return f"reasoning-gym {settings.task}, {count} generated examples"


def base_parameters(model: nn.Module) -> int:
    """Parameters of the base, whatever the number of their bits."""
    return sum(p.numel() for p in _dense(model)) + sum(math.prod(weight.shape) for weight in _quantised(model))


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base's weights and their statistics."""
    dense = sum(p.numel() * p.element_size() for p in _dense(model))
    return dense + sum(weight.nbytes for weight in _quantised(model))


def _dense(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora" not in name and p.is_floating_point()]


def _quantised(model: nn.Module) -> list[Any]:
    from ..quantised import is_quantised, of_module

    return [of_module(module) for module in model.modules() if is_quantised(module) and isinstance(module, nn.Linear)]


def _summary(
    run: Run, before: Evaluation, after: Evaluation, init_seconds: float, seconds: float, tokens: int
) -> dict[str, Any]:
    import resource

    return {
        "eval_loss_before": before.loss,
        "eval_loss_after": after.loss,
        "eval_accuracy_before": before.accuracy,
        "eval_accuracy_after": after.accuracy,
        "eval_examples": len(run.held_out),
        "trainable_params": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "base_params": base_parameters(run.model),
        "base_bytes": base_bytes(run.model),
        "init_seconds": init_seconds,
        "train_seconds": seconds,
        "train_steps": run.steps,
        "tokens_per_second": tokens / seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rank": run.model.peft_config["default"].r,
        "config": asdict(run.settings),
    }


def save(run: Run, report: Any, history: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write the run's files; `summary` gets the adapter's size and is written last."""
    from ..export import export_lora
    from ..files import write_json
    from .pictures import plot_loss

    settings, folder = run.settings, Path(run.settings.output)
    run.model.save_pretrained(str(folder / "adapter"))
    weights = folder / "adapter" / "adapter_model.safetensors"
    summary["adapter_bytes"] = weights.stat().st_size
    if settings.method != "lora":
        export_lora(run.model, folder / "lora", quiet=True)
        report.save(folder / "report.json")
        if report.energy_sign is not None:
            report.plot(folder / "energy.png")
    title = (
        f"{settings.method}, r={summary['rank']}: {_describe_data(settings, len(run.train_ids))}, lr {settings.lr:g}"
    )
    plot_loss(history, summary["eval_loss_before"], summary["eval_loss_after"], folder / "loss.png", title)
    write_json(folder / "summary.json", summary)
