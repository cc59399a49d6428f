"""Methods side by side on real models and data; `python -m benchmarks.methods` runs the grid (see `__main__`)."""
