"""What commands and benchmarks run: settings, data, tokenization, evaluation, and a resumable training run.

It may use the whole library; options and tables of the command line are in `lorasb.cli`.
"""
