"""`LoRASBLinear` and its parts: base weight, merging, groups of layers that read one x, 4-bit layers, experts.

Uses functional, checkpoints, quantization and what is below them; knows neither tuner nor initialization.
"""

import peft  # noqa: F401  registers the method before any module of ours that needs it is half-imported
