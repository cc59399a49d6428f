"""The `lorasb` command."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .tasks import TASKS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fine-tune Hugging Face models with LoRA-SB.")


bench = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
app.add_typer(bench, name="bench")

# What several commands ask for.
ModelOption = Annotated[str, typer.Option(help="Folder or hub id.")]
TaskOption = Annotated[str, typer.Option(help=f"Generated task, without --data: {', '.join(TASKS)}.")]
DataOption = Annotated[Path | None, typer.Option(help="JSONL of prompt/completion, or messages.")]
TrainExamples = Annotated[int, typer.Option(help="Generated training examples.")]
Update = Annotated[str, typer.Option(help="First step of AdamW (the gradient's sign) or of sgd.")]
MaxLength = Annotated[int, typer.Option(help="Tokens an example, at most.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
Bits = Annotated[int, typer.Option(help="Bits of the base's linear weights: 16, or 4 (NF4, nested statistics).")]


@app.command()
def finetune(
    model: ModelOption = "smollm2-135m",
    task: TaskOption = "word_sequence_reversal",
    data: DataOption = None,
    eval_data: Annotated[Path | None, typer.Option(help="JSONL of held-out examples.")] = None,
    method: Annotated[str, typer.Option(help="lora-sb, lora-xs or lora (PEFT's).")] = "lora-sb",
    r: Annotated[int | None, typer.Option(help="Rank; 64, capped at smaller layers (lora: 32).")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the training examples.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    warmup: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = 0.1,
    train_examples: TrainExamples = 3600,
    eval_examples: Annotated[int, typer.Option(help="Held-out examples.")] = 100,
    samples: Annotated[int | None, typer.Option(help="Samples for the initialisation; max(32, n/1000).")] = None,
    update: Update = "adamw",
    max_length: MaxLength = 512,
    dtype: Dtype = "bfloat16",
    bits: Bits = 16,
    seed: Annotated[int, typer.Option(help="Seed of data, initialisation and training.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the run's files.")] = Path("runs/finetune"),
) -> None:
    """Fine-tune a causal language model and show what it learned on held-out problems."""
    from . import show
    from .console import console
    from .finetune import Settings, run_finetune

    settings = Settings(
        model=model,
        task=task,
        data=str(data) if data else None,
        eval_data=str(eval_data) if eval_data else None,
        method=method,
        r=r,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        warmup=warmup,
        train_examples=train_examples,
        eval_examples=eval_examples,
        samples=samples,
        update=update,
        max_length=max_length,
        dtype=dtype,
        bits=bits,
        seed=seed,
        output=str(output),
    )
    result = run_finetune(settings)
    if result.report is not None:
        console.print(show.energies(result.report))
    console.print(show.answers(result.examples, result.before.answers, result.after.answers))
    console.print(show.before_and_after(result.summary))
    console.print(show.costs(result.summary))
    console.print(f"In [bold]{escape(str(output))}[/]: " + ", ".join(sorted(p.name for p in output.iterdir())))


@app.command()
def init(
    model: ModelOption = "smollm2-135m",
    task: TaskOption = "word_sequence_reversal",
    data: DataOption = None,
    r: Annotated[int | None, typer.Option(help="Rank; 64, capped at smaller layers.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the training to come.")] = 2e-3,
    epochs: Annotated[float, typer.Option(help="Its passes, for its number of warm-up steps.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    warmup: Annotated[float, typer.Option(help="Share of its steps that warm up.")] = 0.1,
    train_examples: TrainExamples = 3600,
    samples: Annotated[int | None, typer.Option(help="Samples; max(32, n/1000).")] = None,
    max_length: MaxLength = 512,
    dtype: Dtype = "bfloat16",
    bits: Bits = 16,
    seed: Annotated[int, typer.Option(help="Seed of data and SVD.")] = 0,
    strategy: Annotated[str, typer.Option(help="auto, layerwise or accumulate.")] = "auto",
    memory_budget: Annotated[str | None, typer.Option(help="On top of the model, such as 6GB.")] = None,
    update: Update = "adamw",
    cache: Annotated[Path | None, typer.Option(help="File for the signs: any rank from it later.")] = None,
    stability: Annotated[bool, typer.Option(help="Compare two halves of the samples too.")] = False,
    energy: Annotated[float | None, typer.Option(help="Suggest ranks that keep this share of sign(G).")] = None,
    parameters: Annotated[int | None, typer.Option(help="Suggest ranks for this many parameters.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the run's files.")] = Path("runs/init"),
) -> None:
    """Initialise an adapter, and show what its ranks keep of the first full step."""
    from . import show
    from .console import console
    from .finetune import Settings
    from .initialise import InitSettings, run_init

    settings = Settings(
        model=model, task=task, data=str(data) if data else None, r=r, lr=lr, epochs=epochs, batch_size=batch_size,
        warmup=warmup, train_examples=train_examples, samples=samples, max_length=max_length, dtype=dtype, bits=bits,
        update=update, seed=seed, output=str(output),
    )  # fmt: skip
    where = str(cache) if cache else None
    report, suggestion = run_init(InitSettings(settings, strategy, memory_budget, where, stability, energy, parameters))
    console.print(show.energies(report))
    if suggestion is not None:
        console.print(show.ranks(suggestion))
    console.print(f"In [bold]{escape(str(output))}[/]: " + ", ".join(sorted(p.name for p in output.iterdir())))


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter, or a cache of `lorasb init --cache`.")],
) -> None:
    """Show what a saved adapter, or a cache of signs, holds and where it comes from."""
    from .. import checkpoint
    from ..config import WEIGHTS_NAME
    from . import show
    from .console import console

    if adapter.is_file():
        from ..init.cache import read

        console.print(show.cache(*read(adapter), adapter.stat().st_size))
        return
    config, tensors = checkpoint.read_config(adapter), checkpoint.read_tensors(adapter)
    size = (adapter / WEIGHTS_NAME).stat().st_size
    console.print(show.adapter(config, checkpoint.group_by_layer(tensors), size))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA-SB adapter.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; ADAPTER-lora unless given.")] = None,
) -> None:
    """Write a saved adapter as an exact plain LoRA, which needs no lorasb."""
    from ..export import export_lora

    export_lora(adapter, output or adapter.with_name(adapter.name + "-lora"))


@app.command()
def doctor() -> None:
    """Show versions, backends (and why one is missing), GPU and threads."""
    from .console import console
    from .doctor import examine

    console.print(examine())


@bench.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of the model whose layers are timed.")
    ] = "smollm2-135m",
    r: Annotated[int, typer.Option(help="Rank.")] = 64,
    tokens: Annotated[str, typer.Option(help="Tokens a call, comma-separated.")] = "1,16,512,2048",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
) -> None:
    """Time the kernels' paths and blocks for a model's layers, once; layers take the fastest from then on."""
    from .console import console
    from .tuning import tune_model

    console.print(tune_model(model, r, [int(count) for count in tokens.split(",")], dtype))


def main() -> None:
    """Run the command; what a user can mend is one line, not a traceback."""
    from .console import errors

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports kernels that no command here uses
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's business, not the user's
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        errors.print(f"[bold red]lorasb:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None
