"""`benchmarks/REPORT.md`: every committed result in one page, with its pictures, machines, commits and dates.

python -m benchmarks.report [--results benchmarks/results] [--output benchmarks]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.methods import rows as methods_rows
from benchmarks.methods import runner
from benchmarks.reporting import methods, paper, speed
from benchmarks.reporting.markdown import read_json
from lorasb.files import write_text

HEAD = """\
# Report

Made by `python -m benchmarks.report` from the files in [results](results): what was measured is computed from them, and
only the paper's own figures are typed. Beside each table stand the machine, the commit and the date of its runs. Where
the paper's ordering does not show, a section *why not* says so.
"""


def compose(results: Path) -> str:
    """The page; its pictures are drawn into `results`."""
    rows = methods_rows.read(results / runner.ROWS)
    parts = [HEAD, *methods.section(rows, results), *methods.floors(read_json(results / "floor.json"))]
    parts += [*paper.section(rows, results), *speed.section(results)]
    lines = "\n".join(parts).split("\n")
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]  # one empty line at a time
    return "\n".join(kept).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=runner.RESULTS)
    parser.add_argument("--output", type=Path, default=runner.RESULTS.parent, help="folder of REPORT.md")
    options = parser.parse_args()
    write_text(options.output / "REPORT.md", compose(options.results))
    print(options.output / "REPORT.md")


if __name__ == "__main__":
    main()
