"""Methods side by side on real models and data: `python -m benchmarks.research.methods` runs the grid."""
