"""The paper's tables and figures at a small scale, and further experiments.

    python -m benchmarks.research.paper NAME --data-dir DATA [--minutes 60]

    costs        Table 8: parameters, MACs and FLOPs of real architectures against the published figures
    scale        Theorem 5: training does not depend on s
    curves       Figure 2: training loss of LoRA-SB and LoRA-XS
    overhead     Table 7: the initialization against an epoch
    starts       Table 5: truncated SVD of Kaiming, of ΔW with noise, and of ΔW
    samples      Table 6: samples of the initialization
    orthonormal  Figure 3: B orthonormal or not
    update       sign(G) against G itself
    subspace     orthonormal factors of sign(G), of G and of W
    lengths      how many of R's steps the first step of full fine-tuning is long
    lasting      how long the first gradient's subspace holds the gradient
    start        how far from zero R starts
    again        a second SVD in the middle of training
    cola         CoLA's length of training
    energy       energy captured against the loss reached

`starts` to `cola`, except `lengths` and `lasting`, train the runs missing from methods.csv; curves, overhead and
energy read that file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from benchmarks.common.timing import use_dtype
from benchmarks.research.methods import runner
from benchmarks.research.paper import ablations, costs, curves, energy, lasting, lengths, overhead, scale

COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "costs": lambda options: costs.main(options.output, options.data_dir),
    "scale": lambda options: scale.main(options.output, options.data_dir),
    "curves": curves.main,
    "overhead": overhead.main,
    **{name: partial(ablations.main, name) for name in ablations.ABLATIONS},
    "lengths": lambda options: lengths.main(options.output),
    "lasting": lambda options: lasting.main(options.output),
    "energy": energy.main,
}


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS))
    runner.arguments(parser)
    options = parser.parse_args()
    use_dtype(options.dtype)
    COMMANDS[options.command](options)


if __name__ == "__main__":
    main()
