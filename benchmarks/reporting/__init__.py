"""The sections of `benchmarks/REPORT.md`; `python -m benchmarks.reporting` puts them together."""
