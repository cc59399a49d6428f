"""Programs that measure: each prints what it measured, and with what. Run from the repository, python -m benchmarks.NAME."""
