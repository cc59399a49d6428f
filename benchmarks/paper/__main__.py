"""The paper's tables and figures at this scale.

python -m benchmarks.paper costs                   parameters, MACs and FLOPs of real architectures against Table 8
python -m benchmarks.paper scale --data-dir DATA   Theorem 5: training does not depend on s
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import costs, scale

RESULTS = Path(__file__).parents[1] / "results"
COMMANDS: dict[str, Callable[[Path, Path | None], None]] = {"costs": costs.main, "scale": scale.main}


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--data-dir", type=Path, help="folder of cola.*.jsonl and gsm8k.*.jsonl")
    options = parser.parse_args()
    COMMANDS[options.command](options.output, options.data_dir)


if __name__ == "__main__":
    main()
