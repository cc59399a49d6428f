"""Variables that tests need before torch, transformers or triton are imported: no network, kernels interpreted."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
PTX_VARIABLE = "LORASB_TEST_PTX"  # the architecture of `--ptx`, for xdist's processes and for subprocesses


def _asked_for() -> str:
    """The value of --ptx on pytest's command line."""
    for i, argument in enumerate(sys.argv):
        if argument == "--ptx" and i + 1 < len(sys.argv):
            return sys.argv[i + 1]
        if argument.startswith("--ptx="):
            return argument.removeprefix("--ptx=")
    return ""


if "LORASB_TEST_PTX" not in os.environ and _asked_for():
    os.environ[PTX_VARIABLE] = _asked_for()
PTX = os.environ.get(PTX_VARIABLE, "")
# before a kernel is defined: interpreted on the CPU, or compiled and executed by tests/support/ptx
os.environ["TRITON_INTERPRET"] = "0" if PTX else os.environ.get("TRITON_INTERPRET", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tests fork: the child of a process whose OpenMP has threads waits for them for ever
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
