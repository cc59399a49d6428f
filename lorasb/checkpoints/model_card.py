"""The part of a model card that only we know: base, rank, data, seed, η, samples and versions of an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_text

METHODS = {"update": "LoRA-SB", "lora-xs": "LoRA-XS", "kaiming": "LoRA-SB's layer from a random matrix"}
TEMPLATE = re.compile(r"# Model Card for Model ID.*?(?=### Framework versions|\Z)", flags=re.DOTALL)
START, END = "<!-- lorasb: start -->", "<!-- lorasb: end -->"


def update_card(folder: Path, config: dict[str, Any], scaling: float) -> None:
    """Put or replace our section in the README.md of an adapter folder; makes the file where there is none."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else "---\nlibrary_name: peft\n---\n"
    text = TEMPLATE.sub("", text)  # PEFT's form: forty times "More Information Needed"
    section = f"{START}\n{_section(config, scaling)}\n{END}"
    if START in text:
        text = re.sub(f"{START}.*?{END}", lambda _: section, text, flags=re.DOTALL)
    else:
        front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
        cut = front.end() if front else 0
        text = f"{text[:cut]}\n{section}\n\n{text[cut:].lstrip()}"
    write_text(file, text)


def short(value: Any) -> str:
    """A value as people read it: floats to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(config: dict[str, Any], scaling: float) -> str:
    facts = config.get("init_provenance") or {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted((facts.get("versions") or {}).items()))
    rows = {
        "base model": config.get("base_model_name_or_path"),
        "method": METHODS.get(str(config.get("init")), "LoRA-SB") + ": W = W0 + s·B·R·A, with R trained",
        "also trained, and saved whole": ", ".join(config.get("modules_to_save") or []),
        "rank": config.get("r"),
        "scaling s": scaling,
        "data": facts.get("data"),
        "init": facts.get("init"),
        "init samples": facts.get("num_samples"),
        "init data, SHA-256": facts.get("data_sha256"),
        "seed": facts.get("seed"),
        "η of the simulated step": facts.get("lr"),
        "update rule": facts.get("update"),
        "versions": versions,
    }
    table = "\n".join(f"| {name} | {short(value)} |" for name, value in rows.items() if value not in (None, ""))
    return (
        f"# A LoRA-SB adapter\n\n| | |\n|---|---|\n{table}\n\n"
        "Load it with `import lorasb` and `peft.PeftModel.from_pretrained(base, folder)`, or turn it into a plain LoRA "
        "that needs no lorasb: `lorasb export FOLDER`."
    )
