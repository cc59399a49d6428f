"""Writes docs/compatibility.md from `lorasb.compat`: `python docs/make_compatibility.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from lorasb.compat import Private, accelerate, bitsandbytes, peft, torch, transformers, triton, vllm

MODULES = (torch, transformers, peft, triton, bitsandbytes, accelerate, vllm)

HEAD = """# Private names of other packages

lorasb uses private names where a package has no public one, and replaces or overrides a few functions. The tables, made
from `lorasb/compat/`, give the use of each, and what happens if a release no longer has it (″: as above). A name with
`()` is an attribute of instances. `lorasb/compat/__init__.py` puts an importer into `sys.meta_path`, which registers
the method when PEFT is imported. CI looks the names up (`tests/compat`) on torch 2.10, 2.11 and 2.13, each with the
newest releases of transformers, PEFT and accelerate and with the oldest (`make test-oldest`), and tests both versions
of vLLM. `python docs/make_compatibility.py` writes this page.
"""


def page() -> str:
    """The text of docs/compatibility.md."""
    tables = [_table(module.VERIFIED, module.PRIVATE) for module in MODULES]
    return "\n".join([HEAD, *tables])


def _table(verified: str, names: dict[str, Private]) -> str:
    rows = []
    for absent in dict.fromkeys(one.absent for one in names.values()):
        uses: dict[str, list[str]] = {}
        for one in names.values():
            if one.absent == absent:
                uses.setdefault(one.use, []).append(f"`{one.name}`")
        rows += [f"|{'<br>'.join(same)}|{use}|{'″' if i else absent}|" for i, (use, same) in enumerate(uses.items())]
    return "\n".join([f"## {verified}", "", "|name|use|without it|", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    Path(__file__).with_name("compatibility.md").write_text(page(), encoding="utf-8")
