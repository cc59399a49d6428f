"""What `lorasb finetune` would run with, given a command line."""

from __future__ import annotations

from typing import Any

import typer
from typer.testing import CliRunner

from lorasb.app import cli
from lorasb.app.settings import Settings


def call(*arguments: str) -> dict[str, Any]:
    """The settings that the arguments give."""
    got: list[dict[str, Any]] = []
    app = typer.Typer()
    app.command(cls=cli.Command)(cli.command(got.append, [(Settings, False)], {}))
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return got[0]
