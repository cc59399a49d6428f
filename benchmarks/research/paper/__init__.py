"""The paper's tables and figures at this scale, each a subcommand of `python -m benchmarks.research.paper`."""
