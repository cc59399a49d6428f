"""Settings as a command's options: every one of the list, and --config for a file of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field
from typing import Annotated, Any, Optional

import typer

from ..recipes.config_file import read_config, typed
from ..recipes.settings import listed, option, shown_default


def command(run: Callable[..., None], lists: list[tuple[type, bool]], defaults: dict[str, Any]) -> Callable[..., None]:
    """A command's function with an option for each setting, and --config; `run` gets what was given and no more.

    Args:
        run: called with a dictionary of values: the file's, then those of the command line over them.
        lists: dataclasses of settings, each with whether only the settings of `lorasb init` are meant.
        defaults: other defaults than the lists', by name.
    """
    parameters, chosen = [], [(one, kind, init) for cls, init in lists for one, kind in listed(cls)]
    for one, kind, init in chosen:
        if init and not one.metadata["init"]:
            continue
        says = one.metadata["init"] if init and one.metadata["init"] != "same" else one.metadata["help"]
        parameters.append(_parameter(one, kind, says, defaults.get(one.name)))
    text = typer.Option(help="YAML file of settings; options go before it.")
    parameters.append(_plain("config", Annotated[Optional[str], text]))  # noqa: UP045  typer reads it at run time
    known = {parameter.name: kind for parameter in parameters for one, kind, _ in chosen if one.name == parameter.name}

    def call(**given: Any) -> None:
        file = given.pop("config")
        values = read_config(file, known) if file else {}
        named = {name: value for name, value in given.items() if value is not None}
        run(values | {name: typed(value, known[name], option(name)) for name, value in named.items()})

    call.__doc__ = run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(one: Field[Any], kind: Any, says: str, default: Any) -> inspect.Parameter:
    """None stands for an option that was not given; the default that it has then is shown."""
    shown = shown_default(one) if default is None else str(default)
    basic = kind if kind in (str, int, float, bool) else str
    names = (option(one.name), *one.metadata.get("also", ())) if "also" in one.metadata else ()
    return _plain(one.name, Annotated[Optional[basic], typer.Option(*names, help=says, show_default=shown)])  # noqa: UP045


def _plain(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
