"""Distributed training: collectives for initialization, resuming under FSDP, and saving under DeepSpeed ZeRO-3.

Imports from layers, checkpoints and the levels below them.
"""

# Importing PEFT runs our registration hook, which imports modules of this package: it has to run to its end before one
# of them is half-imported.
import peft  # noqa: F401
