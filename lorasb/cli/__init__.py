"""The `lorasb` command: options, tables and exit codes. What a command runs lives in `lorasb.recipes`."""
