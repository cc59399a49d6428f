"""Writes docs/settings.md from `app.settings`: `python docs/make_settings.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasb.app.settings import AUTO, Settings, listed, option, shown_default


def page() -> str:
    """The text of docs/settings.md."""
    lines = [
        "# Settings of `lorasb finetune`",
        "",
        "Every setting is an option (`--batch-size 32`) and a line of a YAML file (`batch_size: 32`) that `--config`",
        "reads; an option overrides the file's line. A run writes its settings to `config.yaml` in its folder, and",
        "`lorasb finetune --config runs/finetune/config.yaml --output runs/again` repeats it. `lorasb init` also",
        "has the options marked \\*. This page is written by `python docs/make_settings.py`.",
    ]
    group = ""
    for setting, kind in listed(Settings):
        if setting.metadata["group"] != group:
            group = setting.metadata["group"]
            lines += ["", f"## {group.capitalize()}", "", "| option | value | default | |", "|---|---|---|---|"]
        mark = " \\*" if setting.metadata["init"] else ""
        cells = (
            f"`{option(setting.name)}`{mark}",
            _type_name(setting, kind),
            shown_default(setting),
            setting.metadata["help"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _type_name(setting: Any, kind: Any) -> str:
    if setting.name in AUTO:
        return "number or auto"
    names = {str: "text", int: "whole number", float: "number", bool: "on or off"}
    return names.get(kind, "names and ranks")


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
