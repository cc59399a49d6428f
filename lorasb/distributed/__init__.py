"""Distributed training: collectives for initialization, resuming under FSDP, and saving under DeepSpeed ZeRO-3."""

# Importing PEFT runs our registration hook, which imports modules of this package: the hook must finish before any of
# them starts importing.
import peft  # noqa: F401
