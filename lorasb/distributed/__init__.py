"""Several processes: the process group of an initialization, resuming under FSDP, and factors that ZeRO partitions.

Uses layers, checkpoints and what is below them.
"""

import peft  # noqa: F401  registers the method before any module of ours that needs it is half-imported
