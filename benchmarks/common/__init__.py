"""What benchmarks share: timing in turns, shapes of real models, CSV files, figures."""
