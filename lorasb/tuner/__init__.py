"""The PEFT side of LoRA-SB: tuner model, target selection, `patch`, loading, several adapters per model."""

import peft  # noqa: F401  registers the method first, so that no module below is half-imported then
