"""The `lorasb` program: commands, settings, data, training runs and plans. It may use the whole library."""
