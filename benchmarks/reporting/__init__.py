"""The sections of `benchmarks/REPORT.md`; `python -m benchmarks.report` puts them together."""
