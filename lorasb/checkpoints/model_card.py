"""Our section of an adapter's model card: base model, rank, data, seed, learning rate η, samples and versions."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..utils.atomic_files import write_text
from ..utils.reading import Json, read_json

METHODS = {
    "update": "LoRA-SB",
    "lora-xs": "LoRA-XS",
    "lora-xs-output": "LoRA-XS with Σ on the output's side",
    "kaiming": "LoRA-SB's layer from a random matrix",
    "random": "LoRA-SB's layer in a random subspace",
}
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", flags=re.DOTALL)  # YAML
ORIGIN_NAME = "lorasb_origin.json"  # in a converted model's folder: the id on the hub, and how it was converted
TAG = "lora-sb"
START, END = "<!-- lorasb: start -->", "<!-- lorasb: end -->"


def update_card(folder: Path, config: Json, scaling: float) -> None:
    """Insert or replace our section in the README.md of an adapter folder; creates the file if it is missing."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else "---\nlibrary_name: peft\n---\n"
    # the empty form that PEFT writes when it saves, full of "[More Information Needed]"; a filled-in form stays
    form = FRONT_MATTER.sub("", ModelCard.from_template(ModelCardData()).text).strip()
    text = _with_tag(text.replace(form, ""))
    origin = _origin(config)
    if origin.get("hub_id"):
        text = text.replace(str(config["base_model_name_or_path"]), origin["hub_id"])
    rows = _rows(config, origin, scaling).items()
    table = "\n".join(f"| {name} | {short(value)} |" for name, value in rows if value not in (None, ""))
    section = (
        f"{START}\n# A LoRA-SB adapter\n\n**`import lorasb` first**: without it PEFT raises `KeyError: 'LORASB'`. "
        "Then `peft.PeftModel.from_pretrained(base, folder)` loads it; `lorasb export FOLDER` turns it into a plain "
        f"LoRA, which needs no lorasb.\n\n| | |\n|---|---|\n{table}\n\n{END}"
    )
    if START in text:
        # A function, as backslashes in a replacement string would be escapes.
        text = re.sub(f"{START}.*?{END}", lambda _: section, text, flags=re.DOTALL)
    else:
        front_matter = FRONT_MATTER.match(text)  # which has to stay at the top
        start = front_matter.end() if front_matter else 0
        text = f"{text[:start]}\n{section}\n\n{text[start:].lstrip()}"
    write_text(file, text)


def add_usage(folder: Path, usage: str) -> None:
    """Add a paragraph on how to use the adapter to our section of a card that `update_card` has written."""
    file = folder / "README.md"
    if file.is_file():  # an adapter of another method has no section of ours
        text = file.read_text(encoding="utf-8")
        write_text(file, text.replace(END, f"\n{usage}\n{END}") if END in text else f"{text}\n{usage}\n")


def _with_tag(text: str) -> str:
    """Add our tag, by which hubs find adapters, to a card's front matter; a broken front matter is replaced."""
    found = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, RecursionError):
        data = {}
    data = data if isinstance(data, dict) else {}
    tags = data.get("tags")
    data["tags"] = sorted({*map(str, tags if isinstance(tags, list) else ()), TAG})
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{text[found.end() :] if found else text}"


def _origin(config: Json) -> dict[str, str]:
    """Origin of a converted base, from its folder: its id on the hub, and the file that it was dequantized from."""
    base = config.get("base_model_name_or_path")
    file = Path(str(base)) / ORIGIN_NAME
    try:
        return read_json(file) if base and file.is_file() else {}
    except (ValueError, OSError):
        return {}


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(config: Json, origin: dict[str, str], scaling: float) -> Json:
    provenance, base = config.get("init_provenance") or {}, config.get("base_model_name_or_path")
    if origin:
        base = f"{origin.get('hub_id')}, dequantized from {origin.get('converted_from')}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted((provenance.get("versions") or {}).items()))
    return {
        "base model": base,
        "method": METHODS.get(str(config.get("init")), "LoRA-SB") + ": W = W0 + s·B·R·A, with R trained",
        "also trained, and saved whole": ", ".join(config.get("modules_to_save") or []),
        "rank": config.get("r"),
        "scaling s": scaling,
        "data": provenance.get("data"),
        "init": provenance.get("init"),
        "init samples": provenance.get("num_samples"),
        "init data, SHA-256": provenance.get("data_sha256"),
        "seed": provenance.get("seed"),
        "η of the simulated step": provenance.get("lr"),
        "update rule": provenance.get("update"),
        "versions": versions,
    }
