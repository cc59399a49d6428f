"""Distributed training: collectives for initialization, resuming under FSDP, and saving under DeepSpeed ZeRO-3."""

# Importing PEFT runs our registration hook, which imports modules of this package: it must end before one of them
# begins.
import peft  # noqa: F401
