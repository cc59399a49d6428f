"""Programs that measure: each prints what it measured and with what. `python -m benchmarks.NAME` from the root."""
