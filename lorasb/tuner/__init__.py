"""The PEFT side of LoRA-SB: config, tuner model, target selection, `patch`, loading, several adapters per model.

Builds on `layers`; `lorasb.compat.peft_import` registers it with PEFT.
"""

import peft  # noqa: F401  registers the method first, so that no module below is half-imported then
