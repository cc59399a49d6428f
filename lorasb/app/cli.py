"""The `lorasb` command and its subcommands; errors become one line and an exit code.

torch and transformers are imported only when a command runs, so that `lorasb --help` is fast.
"""

from __future__ import annotations

import inspect
import json
import shlex
import signal
import textwrap
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape
from typer import Argument, Option
from typer.core import TyperCommand

from ..constants import DOCS, VERSION, WEIGHTS_NAME
from ..utils.reading import Json
from .data import check_names
from .settings import EMBEDDED, PRESETS, InitSettings, Settings, combined, listed, option, shown_default
from .terminal import StoppedError, console, errors


class Command(TyperCommand):
    """Command that also accepts `--switch true` and `--files a b`, and explains some options only with `--help-all`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Turn `--switch true` into --switch and `false` into --no-switch; repeat an option before further values."""
        negative = {one.opts[0]: one.secondary_opts[0] for one in self.params if getattr(one, "secondary_opts", None)}
        several = [one.opts[0] for one in self.params if getattr(one, "multiple", False)]
        given: list[str] = []
        for argument in args:
            if given and given[-1] in negative and argument.lower() in ("true", "false"):
                given[-1] = given[-1] if argument.lower() == "true" else negative[given[-1]]
                continue
            if len(given) > 1 and given[-2] in several and not argument.startswith("-"):
                given.append(given[-2])
            given.append(argument)
        if "--help-all" in given:
            given, ctx.meta[HELP_ALL] = ["--help"], True
        return super().parse_args(ctx, given)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help without --no-... forms of switches: their column would take a third of the width."""
        shown, panels = copy(self), () if HELP_ALL in ctx.meta else FOLDED
        params: list[Any] = [copy(one) for one in self.params]
        folded = [one for one in params if getattr(one, "rich_help_panel", "") in panels]
        for one in params:
            one.secondary_opts = []
            if isinstance(one.show_default, str):  # which typer would print in parentheses
                one.help, one.show_default = f"{one.help} {escape(f'[default: {one.show_default}]')}", False
        for one in folded:
            one.hidden = True
        shown.params = params
        super(Command, shown).format_help(ctx, formatter)
        if folded:
            console.print(f" [bold]lorasb {self.name} --help-all[/] explains these too; --no-NAME turns a switch off:")
        for panel in dict.fromkeys(one.rich_help_panel for one in folded):
            names = ", ".join(one.opts[0] for one in folded if one.rich_help_panel == panel)
            console.print(f" [bold]{panel}[/]: {names}", highlight=False)
        if any("(docs/" in (one.help or "") for one in params):
            console.print(f" docs/: {DOCS}", highlight=False, soft_wrap=True)


MAIN_PANEL, HELP_ALL = "Most used", "lorasb.help_all"  # a heading of the help; a key of click's context
MOST_USED = {"model", "dtype", "bits", "task", "data", "eval_data", "method", "r"}  # settings under that heading
MOST_USED |= {"adapter_column", "basis", "lr", "epochs", "batch_size", "output"}
CONFIG_HELP = "YAML file of settings; options override it, and --no-NAME turns a switch off."
# the headings of all other settings
FOLDED = tuple(dict.fromkeys(setting.metadata["group"].capitalize() for setting, _ in listed(Settings)))


def command(run: Callable[[Json], None], dataclass: type[Settings]) -> Callable[..., None]:
    """Create a typer command with an option per setting, --config and, for a run, --preset; `run` gets those given."""
    parameters = [_parameter(setting, kind) for setting, kind in listed(dataclass)]
    parameters.append(_option("config", str, CONFIG_HELP, MAIN_PANEL))
    if dataclass is Settings:  # init has fewer settings than a preset
        presets = f"Settings of one of the paper's tables: {', '.join(PRESETS)}."
        parameters.append(_option("preset", str, presets, MAIN_PANEL))
        code = "Allow the --config file to name a Python file as the reward (rl), which the run executes."
        parameters.append(_option("allow_code", bool, code, "Run", "--allow-code"))

    def call(**given: Any) -> None:
        file, preset, allow_code = given.pop("config"), given.pop("preset", None), given.pop("allow_code", False)
        run(combined(dataclass, given, file, preset, allow_code))

    # typer reads a function's signature and annotations to find its options; both are made here.
    call.__doc__ = run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(setting: Field, kind: object) -> inspect.Parameter:
    # typer supports neither dictionaries (rank_pattern) nor numbers that may be "auto": `typed` converts their text
    option_type = kind if kind in (str, int, bool) or (kind is float and setting.default is not None) else str
    name = option(setting.name)
    names = f"{name}/--no-{name[2:]}" if kind is bool else name, *setting.metadata.get("also", ())
    panel = MAIN_PANEL if setting.name in MOST_USED else setting.metadata["group"].capitalize()
    return _option(setting.name, option_type, setting.metadata["help"], panel, *names, shown=shown_default(setting))


def _option(name: str, kind: Any, text: str, panel: str, *names: str, shown: str | bool = True) -> inspect.Parameter:
    """Create a keyword parameter with default None (option not given); the help shows the real default, `shown`."""
    option = Option(*names, help=text, show_default=shown, rich_help_panel=panel)
    annotation = Annotated[Optional[kind], option]  # noqa: UP045  typer reads it at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


INTERRUPTED = 128 + signal.SIGINT  # as shells report it
app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fine-tune Hugging Face models with LoRA-SB.")


@app.callback(invoke_without_command=True)
def _print_version(
    version: Annotated[bool, Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"lorasb {VERSION}")
        raise typer.Exit


basis = typer.Typer(no_args_is_help=True, help="Create a basis that adapters share, or check how well data fits one.")
app.add_typer(basis, name="basis")
bench = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
app.add_typer(bench, name="bench")


def _finetune(values: Json) -> None:
    """Fine-tune a language model or classifier, and compare its held-out answers before and after."""
    if values.get("basis") and not values.get("model"):
        from .adapter import read_card

        values["model"] = read_card(values["basis"]).model
    settings = Settings(**values)
    settings.check()  # and the names below: before importing torch and transformers, which takes seconds
    check_names(settings)
    from . import tables
    from .adapter import CARD_NAME
    from .finetune import run_finetune
    from .results import IN_WORDS, example_to_ask, how_to

    result = run_finetune(settings)
    if console.quiet:  # only rank 0 prints the tables
        return
    summary = result.summary
    how = IN_WORDS[summary["prompt_format"]]
    console.print(tables.answers(result.examples, result.before.answers, result.after.answers, how))
    console.print(tables.before_and_after(summary))
    if summary["adapters"]:
        console.print(tables.adapters(summary))
    for line in tables.advice(summary):
        console.print(line)
    if found := summary["basis_fit"]:
        console.print(tables.basis_line(found["share"], found["random"]))
    console.print(tables.costs(summary))
    console.print(_files(settings.output))
    lines = how_to(summary, Path(settings.output), example_to_ask(result))
    # not through the console, which would wrap long lines
    typer.echo(f"\nAsk it (leave the question out to type several):\n\n  {lines['command']}\n\nIn Python:\n")
    typer.echo(f"{textwrap.indent(lines['python'], '  ')}\n")
    if settings.method != "lora" and summary["classes"] is None:
        on_basis = summary["adapters"] or settings.basis
        by = f"vLLM with the plugin ({DOCS}/serving.md)" if on_basis else "vLLM, as a plain LoRA"
        typer.echo(f"Serve it with {by}:\n\n  {lines['serve']}\n")
    on = settings.basis or f"{settings.output}/adapter"
    if summary["adapters"] and Path(on, CARD_NAME).is_file():  # runs of lorasb 0.3 have none
        typer.echo(
            f"Add an adapter later:\n\n  lorasb finetune --basis {shlex.quote(on)} --data NEW.jsonl --output runs/new\n"
        )


def _init(values: Json) -> None:
    """Initialize an adapter without training it, and show how much of full fine-tuning's first step each rank keeps."""
    from . import tables
    from .adapter import run_init

    settings = InitSettings(**values)
    report, suggestion = run_init(settings)
    console.print(report)
    if suggestion is not None:
        console.print(tables.ranks(suggestion))
    console.print(_files(settings.output))


def _files(output: str) -> str:
    """List the files of a run, and explain the folders among them."""
    folders = {"adapter": "adapter (for PEFT)", "lora": "lora (the same as a plain LoRA, for vLLM)"}
    names = sorted(path.name for path in Path(output).iterdir())
    return f"In [bold]{escape(output)}[/]: " + ", ".join(folders.get(name, name) for name in names)


app.command("finetune", cls=Command)(command(_finetune, Settings))
app.command("init", cls=Command)(command(_init, InitSettings))


@app.command(cls=Command)
def plan(
    name: Annotated[str | None, Argument(metavar="MODEL", help="Model folder or Hub ID; its config is read.")] = None,
    model: Annotated[str | None, Option(help="Same as MODEL.", show_default=EMBEDDED)] = None,
    gpu: Annotated[str | None, Option(help="GPU to plan for: a6000, 4090, h100, ...; default: this machine.")] = None,
    r: Annotated[int | None, Option("--r", "--rank", help="Rank.", show_default="64")] = None,
    batch: Annotated[int, Option("--batch-size", "--batch", help="Rows computed at once.", min=1)] = 4,
    seq: Annotated[int, Option("--max-length", "--seq", help="Tokens per row.", min=2)] = 512,
    bits: Annotated[int, Option(help="Bits per weight of the base model: 16 or 4.")] = 16,
    gradient_checkpointing: Annotated[
        bool, Option(help="Recompute activations in the backward pass.", show_default=False)
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the memory and time of a run, whether it fits, and what to change if not."""
    from . import tables
    from .plan import Request, find_gpu, plan_memory, smaller_plans

    if bits not in (4, 16):
        raise ValueError(f"--bits must be 4 or 16, got {bits}")
    card = find_gpu(gpu) if gpu else None
    request = Request(name or model or EMBEDDED, r, batch, seq, bits, gradient_checkpointing, card)
    where = card.title if card else "this machine"
    with errors.status(f"simulating a step of {escape(request.model)} for {where}: up to a minute"):
        found = plan_memory(request)
        better = [] if found.fits else list(smaller_plans(found))
    if as_json:
        print(json.dumps(found.to_json() | {"changes": {change: one.needed for change, one in better}}, indent=1))
    else:
        console.print(tables.plan_table(found, better))


@app.command(cls=Command)
def ask(
    run: Annotated[Path, Argument(help="Folder of a run of `lorasb finetune`.")],
    question: Annotated[str | None, Argument(help="Question to ask; without it, one per line until Ctrl-D.")] = None,
    second: Annotated[str | None, Argument(help="Second text, for a classifier of pairs.")] = None,
    adapter: Annotated[str | None, Option(help="Which adapter to ask, for a run with --adapter-column.")] = None,
    max_new_tokens: Annotated[int | None, Option(help="Maximum tokens per answer.", min=1, show_default="256")] = None,
    model: Annotated[str | None, Option(help="Base model's folder or Hub ID; default: as in training.")] = None,
) -> None:
    """Ask a trained run a question, formatted as its training examples were."""
    from .results import answers

    for answer in answers(run, question, adapter, max_new_tokens, model, second):
        typer.echo(answer or "(empty)")


@app.command("inspect")
def show(
    adapter: Annotated[Path, Argument(help="Folder of a saved adapter.")],
) -> None:
    """Show what a saved adapter contains and where it comes from."""
    from ..checkpoints import adapter_file
    from . import tables

    config, tensors = adapter_file.read_config(adapter), adapter_file.read_tensors(adapter)
    size = (adapter / WEIGHTS_NAME).stat().st_size
    console.print(tables.adapter(config, adapter_file.group_by_layer(tensors), size))


@app.command()
def export(
    adapter: Annotated[Path, Argument(help="Folder of a saved LoRA-SB adapter.")],
    output: Annotated[Path | None, Option(help="Folder to write; default: ADAPTER-lora.")] = None,
    format: Annotated[str, Option(help="peft (also for vLLM), vllm (with experts), or gguf (llama.cpp).")] = "peft",
) -> None:
    """Export a saved adapter as an exact plain LoRA, which works without lorasb."""
    from ..export.lora import export_lora

    whole = adapter.resolve()  # "." has no name
    folder = output.expanduser() if output else whole.with_name(whole.name + "-lora")  # `--output=~/x`
    export_lora(adapter, folder, format=format)


@app.command()
def doctor() -> None:
    """Show versions, backends (and why one is missing), GPU, threads, and the dtype that auto picks."""
    from .tables import machine

    console.print(machine())


Samples = Annotated[int | None, Option(help="Number of samples from each file.", min=1, show_default="max(32, n/1000)")]
Template = Annotated[str, Option(help="How prompts are formatted, as in finetune: auto or none.")]


@basis.command(cls=Command)
def make(
    model: Annotated[str, Argument(help="Model folder or Hugging Face Hub ID.")],
    output: Annotated[str, Option(help="Folder to write the basis into.")],
    data: Annotated[
        list[str] | None, Option(help="JSONL files with prompt and completion: a.jsonl b.jsonl, one per task.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        Option(help="Instead of --data: PEFT LoRAs trained on tasks, whose updates the basis keeps."),
    ] = None,
    r: Annotated[int | None, Option("--r", "--rank", help="Rank, at most 256.", show_default="64; the LoRAs'")] = None,
    update: Annotated[str, Option(help="First step to simulate: adamw, sgd or per-sample, as in finetune.")] = "adamw",
    samples: Samples = None,
    template: Template = "auto",
    seed: Annotated[int, Option(help="Random seed for samples and SVD.")] = 0,
) -> None:
    """Create a basis from the first steps of several tasks, or from LoRAs: A and B for adapters that hold only R."""
    from .adapter import make_basis
    from .tables import card_table

    settings = Settings(model=model, output=output, r=r, update=update, samples=samples, template=template, seed=seed)
    console.print(card_table(make_basis(settings, data or [], lora or [])))
    console.print(_files(settings.output))


@basis.command(cls=Command)
def fit(
    folder: Annotated[str, Argument(metavar="BASIS", help="Folder of a basis.")],
    data: Annotated[str, Option(help="JSONL file with prompt and completion.")],
    model: Annotated[str | None, Option(help="Base model's folder or Hub ID; default: as for the basis.")] = None,
    samples: Samples = None,
    template: Template = "auto",
    seed: Annotated[int, Option(help="Random seed for the samples.")] = 0,
) -> None:
    """Show how much of your data's first step a basis keeps, before you train on it."""
    from .adapter import fit_basis, read_card
    from .tables import fit_table

    place = model or read_card(folder).model
    settings = Settings(model=place, basis=folder, data=data, samples=samples, template=template, seed=seed)
    console.print(fit_table(fit_basis(settings)))


@bench.command()
def tune(
    model: Annotated[str, Argument(help="Model folder or Hub ID whose layers are timed.")] = EMBEDDED,
    r: Annotated[int, Option(help="Rank.")] = 64,
    tokens: Annotated[str, Option(help="Tokens per call, comma-separated.")] = "1,16,512,2048",
    dtype: Annotated[str, Option(help="auto, bf16, fp16 or fp32.")] = "auto",
) -> None:
    """Time the GPU kernels' paths and tiles on all of a model's layers; the fastest are used from then on."""
    from .tune_kernels import tune_model

    console.print(tune_model(model, r, [int(count) for count in tokens.split(",")], dtype))


def main() -> None:
    """Run the command; print errors that a user can fix as one line, without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # raised by PEFT's calls
    try:
        app(prog_name="lorasb")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer turns Ctrl-C into this code, without a message
            raise KeyboardInterrupt from None
        raise
    except StoppedError as stopped:
        errors.print(f"[bold yellow]lorasb:[/] {escape(str(stopped))}", highlight=False)
        raise SystemExit(stopped.code) from None  # 128 + signal number, as shells report it
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        errors.print(f"[bold red]lorasb:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None
