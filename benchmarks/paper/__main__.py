"""The paper's tables and figures at this scale.

python -m benchmarks.paper costs     parameters, MACs and FLOPs of four real architectures against Table 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import costs

RESULTS = Path(__file__).parents[1] / "results"
COMMANDS: dict[str, Callable[[Path], None]] = {"costs": costs.main}


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    COMMANDS[options.command](options.output)


if __name__ == "__main__":
    main()
