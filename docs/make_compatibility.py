"""Writes docs/compatibility.md from `lorasb.compat`: `python docs/make_compatibility.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from lorasb.compat import Private, accelerate, bitsandbytes, peft, torch, transformers, triton, vllm

MODULES = (torch, transformers, peft, triton, bitsandbytes, accelerate, vllm)

HEAD = """# Private names of other packages

lorasb uses private names where a package has no public one, and replaces a few functions. The tables list those of
`lorasb/compat/`, what each is for, and what happens if a release no longer has it (″: as above). A name with `()` is an
attribute of instances. `lorasb/compat/peft_import.py` puts an importer into `sys.meta_path`, which registers the method
when PEFT is imported. CI runs the tests with the oldest and the newest versions.
`python docs/make_compatibility.py` writes this page.
"""


def page() -> str:
    """The text of docs/compatibility.md."""
    tables = [_table(module.VERIFIED, module.PRIVATE) for module in MODULES]
    return "\n".join([HEAD, *tables])


def _table(verified: str, names: dict[str, Private]) -> str:
    rows = []
    for absent in dict.fromkeys(one.absent for one in names.values()):
        same = [one for one in names.values() if one.absent == absent]
        rows += [f"| `{one.name}` | {one.use} | {'″' if i else absent} |" for i, one in enumerate(same)]
    return "\n".join([f"## {verified}", "", "| name | use | without it |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    Path(__file__).with_name("compatibility.md").write_text(page(), encoding="utf-8")
