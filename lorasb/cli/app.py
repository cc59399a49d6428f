"""The `lorasb` command: its subcommands, and how errors become one line and an exit code.

Imports of torch and transformers wait until a command runs, so that `lorasb --help` is quick.
"""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .._version import __version__
from ..recipes.examples.named_data import check_names
from ..recipes.settings import EMBEDDED, INIT_OUTPUT, InitSettings, Settings, listed
from .options import Command, command

INTERRUPTED = 128 + signal.SIGINT  # as shells report it
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    invoke_without_command=True,
    help="Fine-tune Hugging Face models with LoRA-SB.",
)


@app.callback()
def _of_all(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"lorasb {__version__}")
        raise typer.Exit


bench = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
app.add_typer(bench, name="bench")


def _finetune(values: dict[str, Any]) -> None:
    """Fine-tune a language model, or a classifier, and show what it learned on held-out problems."""
    settings = Settings(**values)
    settings.check()  # and the data's names: before torch and transformers are imported, which takes seconds
    check_names(settings)
    from ..recipes.ask import how_to
    from ..recipes.console import console
    from ..recipes.finetune import run_finetune
    from . import tables

    result = run_finetune(settings)
    if console.quiet:  # not rank 0, which prints the same tables
        return
    if result.report is not None:
        console.print(tables.energies(result.report))
    console.print(tables.answers(result.examples, result.before.answers, result.after.answers))
    console.print(tables.before_and_after(result.summary))
    if result.summary.get("adapters"):
        console.print(tables.adapters(result.summary))
    for line in tables.advice(result.summary):
        console.print(line)
    console.print(tables.costs(result.summary))
    console.print(_files(settings.output))
    if "prompt_format" in result.summary:  # results of earlier versions do not say
        lines = how_to(result.summary, Path(settings.output), result.examples[0].prompt)
        typer.echo(tables.how_to_use(lines))  # not by the console, which would break long lines


def _init(values: dict[str, Any]) -> None:
    """Initialize an adapter, and show what its ranks keep of the first full step."""
    from ..recipes.console import console
    from ..recipes.initialize import run_init
    from . import tables

    # `lorasb init` has options of two dataclasses: a run's settings, and those of initialization.
    init_names = {setting.name for setting, _ in listed(InitSettings)}
    shared = {name: value for name, value in values.items() if name not in init_names}
    settings = Settings(**{"output": INIT_OUTPUT} | shared)
    init_settings = InitSettings(settings, **{name: value for name, value in values.items() if name in init_names})
    report, suggestion = run_init(init_settings)
    console.print(tables.energies(report))
    if suggestion is not None:
        console.print(tables.ranks(suggestion))
    console.print(_files(settings.output))


def _files(output: str) -> str:
    """The files of a run, with what the folders among them are."""
    folders = {"adapter": "adapter (for PEFT)", "lora": "lora (the same as a plain LoRA, for vLLM)"}
    names = sorted(path.name for path in Path(output).iterdir())
    return f"In [bold]{escape(output)}[/]: " + ", ".join(folders.get(name, name) for name in names)


app.command("finetune", cls=Command)(command(_finetune, [(Settings, False)], {}))
app.command("init", cls=Command)(command(_init, [(Settings, True), (InitSettings, False)], {"output": INIT_OUTPUT}))


@app.command(cls=Command)
def plan(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or hub id; its config is read.")] = None,
    model: Annotated[str | None, typer.Option(help="The same.", show_default=EMBEDDED)] = None,
    gpu: Annotated[str | None, typer.Option(help="a6000, 4090, h100 ...; this machine unless given.")] = None,
    r: Annotated[int | None, typer.Option("--r", "--rank", help="Rank.", show_default="64")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step that are computed at once.", min=1)] = 4,
    seq: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 512,
    bits: Annotated[int, typer.Option(help="Bits of the base's linear weights: 16 or 4.")] = 16,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in backward.", show_default=False)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the memory and time that a run will take, whether it fits, and what to change."""
    import json

    from ..recipes.console import console, errors
    from ..recipes.planning import gpus, planner
    from ..recipes.planning.request import Request
    from . import plan_table

    if bits not in (4, 16):
        raise ValueError(f"--bits must be 4 or 16, got {bits}")
    card = gpus.find(gpu) if gpu else None
    request = Request(name or model or EMBEDDED, r, batch, seq, bits, gradient_checkpointing, card)
    where = card.title if card else "this machine, where it is tried in processes of its own"
    with errors.status(f"counting a step of {request.model} for {where}: up to a minute"):
        found = planner.plan(request)
        better = [] if found.fits else list(planner.changes(found))
    if as_json:
        print(json.dumps(found.to_json() | {"changes": {change: one.needed for change, one in better}}, indent=1))
    else:
        console.print(plan_table.shown(found, better))


@app.command()
def ask(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `lorasb finetune`.")],
    question: Annotated[str | None, typer.Argument(help="Prompt; without one, lines are read until Ctrl-D.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Of a run with --adapter-column: whose.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.", min=1, show_default="256")] = None,
) -> None:
    """Answer a question with what a run has trained, put as its training examples were."""
    from ..recipes.ask import answers

    for answer in answers(run, question, adapter, max_new_tokens):
        typer.echo(answer or "(empty)")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter, or a cache of `lorasb init --cache`.")],
) -> None:
    """Show what a saved adapter, or a cache of signs, holds and where it comes from."""
    from ..checkpoints import adapter_file
    from ..constants import WEIGHTS_NAME
    from ..recipes.console import console
    from . import tables

    if adapter.is_file():
        from ..init.factors.sign_cache import read

        console.print(tables.cache(*read(adapter), adapter.stat().st_size))
        return
    config, tensors = adapter_file.read_config(adapter), adapter_file.read_tensors(adapter)
    size = (adapter / WEIGHTS_NAME).stat().st_size
    console.print(tables.adapter(config, adapter_file.group_by_layer(tensors), size))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA-SB adapter.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; ADAPTER-lora unless given.")] = None,
    format: Annotated[str, typer.Option(help="peft (vLLM too), vllm (experts), or gguf (llama.cpp).")] = "peft",
) -> None:
    """Write a saved adapter as an exact plain LoRA, which needs no lorasb."""
    from ..export.lora import export_lora

    whole = adapter.resolve()  # "." has no name
    export_lora(adapter, output or whole.with_name(whole.name + "-lora"), format=format)


@app.command()
def doctor() -> None:
    """Show versions, backends (and why one is missing), GPU, threads, and the dtype that auto takes."""
    from ..recipes.console import console
    from .doctor import examine

    console.print(examine())


@bench.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of the model whose layers are timed.")
    ] = "smollm2-135m",
    r: Annotated[int, typer.Option(help="Rank.")] = 64,
    tokens: Annotated[str, typer.Option(help="Tokens a call, comma-separated.")] = "1,16,512,2048",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
) -> None:
    """Time the kernels' paths and blocks for a model's layers, once; layers take the fastest from then on."""
    from ..recipes.console import console
    from .tune_kernels import tune_model

    console.print(tune_model(model, r, [int(count) for count in tokens.split(",")], dtype))


def main() -> None:
    """Run the command; print errors that a user can fix as one line, without a traceback."""
    from ..recipes.console import errors

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # raised by PEFT's calls
    from ..recipes.signals import StoppedError

    try:
        app(prog_name="lorasb")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # which typer makes of a Ctrl-C, without a word
            raise KeyboardInterrupt from None
        raise
    except StoppedError as stopped:
        errors.print(f"[bold yellow]lorasb:[/] {escape(str(stopped))}", highlight=False)
        raise SystemExit(stopped.code) from None  # 128 + signal number, as shells report it
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        errors.print(f"[bold red]lorasb:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None
