"""Variables that tests need before torch, transformers or triton are imported: no network, kernels interpreted."""

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"
_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_parser.add_argument("--ptx", default="")
# the architecture of `--ptx`, also for xdist's workers and subprocesses
PTX = os.environ.setdefault("LORASB_TEST_PTX", _parser.parse_known_args()[0].ptx)
# before a kernel is defined: interpreted on the CPU, or compiled and executed by benchmarks/kernels/ptx
os.environ["TRITON_INTERPRET"] = "0" if PTX else os.environ.get("TRITON_INTERPRET", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tests fork, and the child of a process with OpenMP threads would wait for them endlessly
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
