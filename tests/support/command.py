"""Run the command line in this process, where everything is already imported."""

from typer.testing import CliRunner

from lorasb.app.cli import app


def call(*arguments: object) -> str:
    """Return what `lorasb` prints; it must succeed, and raises errors that it would report in one line."""
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "150"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
