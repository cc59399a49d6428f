"""Hooks of the documentation site: links to files of the repository must work there as they do on GitHub.

The report, and the pictures of benchmarks/ that it and the pages show, become pages and files of the site. Links to any
other file of the repository point to the repository's URL.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
REPORT = "benchmarks/REPORT.md"
LINK = re.compile(r"""(\]\(|\ssrc="|\ssrcset=")(?!https?:|#|mailto:)([^)#\s"]+)""")


def on_files(files: Any, config: Any) -> Any:
    """Add the report, the README as the home page, and pictures of results."""
    added = {"report.md": ROOT / REPORT, "index.md": ROOT / "README.md"}
    added |= {f"results/{picture.name}": picture for picture in (ROOT / "benchmarks").glob("**/results/*.png")}
    for name, source in added.items():
        files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links of a page, which are relative to its file's place in the repository."""
    here = {"report.md": "benchmarks", "index.md": ""}.get(page.file.src_uri, "docs")

    # MkDocs resolves the links of Markdown; those of HTML start at the page's own folder
    up = "" if page.file.src_uri == "index.md" else "../"

    def rewritten(match: re.Match[str]) -> str:
        return (
            match[1]
            + ("" if match[1] == "](" else up)
            + _target(posixpath.normpath(posixpath.join(here, match[2])), config["repo_url"])
        )

    return LINK.sub(rewritten, markdown)


def _target(path: str, repository: str) -> str:
    """Where a file of the repository is found from a page of the site."""
    if path == REPORT:
        return "report.md"
    if path.startswith("benchmarks/") and path.endswith(".png"):
        return f"results/{posixpath.basename(path)}"
    inside = path.removeprefix("docs/")
    if path.startswith("docs/") and path.endswith((".md", ".png", ".svg")):
        return inside
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository}/{kind}/main/{path}"
