"""The command line in this process, which has loaded all that it needs."""

from __future__ import annotations

from typer.testing import CliRunner

from lorasb.app.cli import app


def call(*arguments: object) -> str:
    """What `lorasb` prints; it has to succeed, and raises what it would report in a line."""
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "150"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
