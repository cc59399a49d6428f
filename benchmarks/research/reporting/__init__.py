"""The sections of `benchmarks/REPORT.md`; `python -m benchmarks.research.reporting` puts them together."""
