"""Writes settings.md from the list of settings: `python docs/make_settings.py`. A test holds the page to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasb.recipes.settings import Settings, listed, option, shown_default


def page() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings of `lorasb finetune`",
        "",
        "Every setting is an option (`--batch-size 32`) and a line of a YAML file (`batch_size: 32`) that `--config`",
        "reads; an option goes before the file's line. A run writes its own as `config.yaml` beside its results, and",
        "`lorasb finetune --config runs/finetune/config.yaml --output runs/again` repeats it. Those marked \\* are",
        "`lorasb init`'s, too. This page is written by `python docs/make_settings.py`.",
    ]
    group = ""
    for one, kind in listed(Settings):
        if one.metadata["group"] != group:
            group = one.metadata["group"]
            lines += ["", f"## {group.capitalize()}", "", "| option | value | default | |", "|---|---|---|---|"]
        mark = " \\*" if one.metadata["init"] else ""
        lines.append(f"| `{option(one.name)}`{mark} | {_words(kind)} | {shown_default(one)} | {one.metadata['help']} |")
    return "\n".join(lines) + "\n"


def _words(kind: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "on or off"}
    return names.get(kind, "names and ranks")


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
