"""What a command or a benchmark runs: settings, data, tokenization, evaluation, one resumable training run.

Everything here may use the whole library below; nothing here knows of command-line options.
"""
