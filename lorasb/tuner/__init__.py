"""The PEFT side of LoRA-SB: tuner model, target selection, `patch`, loading, several adapters per model."""

import peft  # noqa: F401  first: registers the method while no module of this package is half-imported
