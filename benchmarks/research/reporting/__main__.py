"""Write `benchmarks/REPORT.md`: every committed result on one page, with its pictures, machines, commits and dates.

python -m benchmarks.research.reporting [--results benchmarks/research/results] [--speed benchmarks/results]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.research.methods import rows as methods_rows
from benchmarks.research.methods import runner
from benchmarks.research.reporting import methods, paired, paper, speed, unseen
from benchmarks.research.reporting.markdown import read_json
from lorasb.utils.atomic_files import write_text

OPEN, CLOSE = "<!-- headline -->", "<!-- /headline -->"
HEAD = """\
# Report

`python -m benchmarks.research.reporting` computes this page from the files in [results](results) and
[research/results](research/results); only the paper's figures are entered by hand. Each table names the machine, the
commit and the date of its runs. A commit with `-dirty` had uncommitted changes, so its runs cannot be repeated exactly.
Where the results differ from the paper's ordering of methods, a section *why not* explains why.

SmolLM2-135M is `SmolLM2-135M-Instruct`, dequantized from a 4-bit GGUF (Q4_1) in a PyPI package: 16 bits means this
model in bf16, and comparisons of 16 with 4 bits start from it.
"""


def compose(results: Path, speed_results: Path) -> str:
    """Return the page, and draw the pictures of the research into `results`."""
    rows = methods_rows.read(results / runner.ROWS)
    parts = [HEAD, *methods.section(rows, results), *methods.floors(read_json(results / "floor.json"))]
    parts += [
        *paired.section(results),
        *unseen.section(results),
        *paper.section(rows, results),
        *speed.section(speed_results),
    ]
    lines = "\n".join(parts).split("\n")
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]  # one empty line at a time
    return "\n".join(kept).rstrip() + "\n"


def into_readme(readme: str, results: Path) -> str:
    """Return a page with its table of methods updated from the results."""
    before, rest = readme.split(OPEN)
    after = rest.split(CLOSE)[1]
    table = "\n".join(methods.headline(methods_rows.read(results / runner.ROWS)))
    return f"{before}{OPEN}\n{table}\n{CLOSE}{after}"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=runner.RESULTS, help="folder with the research results")
    parser.add_argument("--speed", type=Path, default=runner.BENCHMARKS / "results", help="folder with other results")
    parser.add_argument("--output", type=Path, default=runner.BENCHMARKS, help="folder of REPORT.md")
    parser.add_argument("--readme", type=Path, help="also update the table of methods in this page: docs/evidence.md")
    options = parser.parse_args()
    write_text(options.output / "REPORT.md", compose(options.results, options.speed))
    print(options.output / "REPORT.md")
    if options.readme:
        write_text(options.readme, into_readme(options.readme.read_text(encoding="utf-8"), options.results))
        print(options.readme)


if __name__ == "__main__":
    main()
