"""What PEFT sees: configuration, tuner model, targets, `patch`, loading, several adapters.

Uses layers and what is below them. `lorasb._peft_registration` makes PEFT know it.
"""

import peft  # noqa: F401  registers the method before any module of ours that needs it is half-imported
