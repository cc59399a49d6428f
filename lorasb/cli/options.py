"""Makes a command's options from dataclasses of settings, and adds --config for a YAML file of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from ..recipes import preset
from ..recipes.config_file import read_config, typed
from ..recipes.console import console
from ..recipes.setting_rules import option
from ..recipes.settings import DEFAULT_TASK, REWARDS, Settings, listed, shown_default


class Command(TyperCommand):
    """A command that takes `--switch true` as well, and whose help folds what `--help-all` prints."""

    folds = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace the value of a switch (`--packing true`) by one of its two forms."""
        negative = {one.opts[0]: one.secondary_opts[0] for one in self.params if getattr(one, "secondary_opts", None)}
        given: list[str] = []
        for argument in args:
            if given and given[-1] in negative and argument.lower() in ("true", "false"):
                given[-1] = given[-1] if argument.lower() == "true" else negative[given[-1]]
            else:
                given.append(argument)
        if "--help-all" in given:
            given, self.folds = ["--help"], False
        return super().parse_args(ctx, given)

    def format_help(self, *arguments: Any) -> None:
        """Print the help, without the --no-... of switches: their column takes a third of its width."""
        switches: list[Any] = [one for one in self.params if getattr(one, "secondary_opts", None)]
        kept = [one.secondary_opts for one in switches]
        folded: list[Any] = [one for one in self.params if self.folds and getattr(one, "rich_help_panel", "") in FOLDED]
        for one in switches:
            one.secondary_opts = []
        for one in folded:
            one.hidden = True
        try:
            super().format_help(*arguments)
        finally:
            for one, names in zip(switches, kept, strict=True):
                one.secondary_opts = names
            for one in folded:
                one.hidden = False
        if folded:
            console.print(f" [bold]lorasb {self.name} --help-all[/] explains these too; --no-NAME takes a switch back:")
        for panel in dict.fromkeys(one.rich_help_panel for one in folded):
            names = ", ".join(one.opts[0] for one in folded if one.rich_help_panel == panel)
            console.print(f" [bold]{panel}[/]: {names}", highlight=False)
        self.folds = True


MAIN_PANEL = "Most used"
# the headings of all other settings
FOLDED = tuple(dict.fromkeys(setting.metadata["group"].capitalize() for setting, _ in listed(Settings)))


def command(run: Callable[..., None], lists: list[tuple[type, bool]], defaults: dict[str, Any]) -> Callable[..., None]:
    """A typer command with an option for each setting, --config and, for a run, --preset.

    Args:
        run: called with a dictionary of the values that were given: options go before the file of --config, and that
            goes before the preset.
        lists: dataclasses of settings, each with True if only the settings of `lorasb init` become options.
        defaults: defaults that differ from the dataclasses', by name.
    """
    parameters: list[inspect.Parameter] = []
    settings = [(setting, kind, init) for cls, init in lists for setting, kind in listed(cls)]
    for setting, kind, init in settings:
        init_help = setting.metadata["init"]  # "": no option of `lorasb init`; "same": has the help text of a run's
        if init and not init_help:
            continue
        help_text = init_help if init and init_help != "same" else setting.metadata["help"]
        parameters.append(_parameter(setting, kind, help_text, defaults.get(setting.name)))
    text = typer.Option(
        help="YAML file of settings; options override it, --no-NAME what it switches on.", rich_help_panel=MAIN_PANEL
    )
    parameters.append(_plain("config", Annotated[Optional[str], text]))  # noqa: UP045  typer reads it at run time
    with_presets = not any(init for _, init in lists)  # `lorasb init` has fewer settings than a preset
    if with_presets:
        text = typer.Option(
            help=f"Settings of one of the paper's tables: {', '.join(preset.names())}.", rich_help_panel=MAIN_PANEL
        )
        parameters.append(_plain("preset", Annotated[Optional[str], text]))  # noqa: UP045
        text = typer.Option(
            "--allow-code", help="Run the Python file that rl of --config names.", rich_help_panel="Run"
        )
        parameters.append(_plain("allow_code", Annotated[Optional[bool], text]))  # noqa: UP045
    optional = {parameter.name for parameter in parameters}
    types = {setting.name: kind for setting, kind, _ in settings if setting.name in optional}

    def call(**given: Any) -> None:
        file, name, allowed = given.pop("config"), given.pop("preset", None), given.pop("allow_code", None)
        values = read_config(preset.find(name), types) if name else {}
        values |= read_config(file, types) if file else {}
        if values.get("task") == DEFAULT_TASK and (values.get("data") or given.get("data")):
            del values["task"]  # earlier versions wrote the default beside a file
        if values.get("rl") not in (None, *REWARDS) and given.get("rl") is None and not allowed:
            raise ValueError(
                f"--config {file}: rl is {values['rl']}, and the run would execute that file: add --allow-code if you "
                "trust it"
            )
        named = {name: value for name, value in given.items() if value is not None}
        run(values | {name: typed(value, types[name], option(name)) for name, value in named.items()})

    # typer reads a function's signature and annotations to find its options; both are made here.
    call.__doc__ = run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(setting: Field[Any], kind: Any, help_text: str, default: Any) -> inspect.Parameter:
    """A keyword parameter whose default is None (option not given); the help shows the setting's real default."""
    shown = shown_default(setting) if default is None else str(default)
    # typer knows no dictionaries (rank_pattern), nor numbers that may be "auto": they arrive as text, for `typed`
    option_type = kind if kind in (str, int, bool) or (kind is float and setting.default is not None) else str
    name = option(setting.name)
    names = f"{name}/--no-{name[2:]}" if kind is bool else name, *setting.metadata.get("also", ())
    panel = MAIN_PANEL if setting.metadata.get("main") else setting.metadata["group"].capitalize()
    typer_option = typer.Option(*names, help=help_text, show_default=shown, rich_help_panel=panel)
    return _plain(setting.name, Annotated[Optional[option_type], typer_option])  # noqa: UP045


def _plain(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
