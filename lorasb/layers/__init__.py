"""The adapter layers: `LoRASBLinear` over a frozen base, groups of layers that share an input, 4-bit layers, experts.

Imports functional, checkpoints, quantization and what is below them; never tuner or init.
"""

# Importing peft runs our registration hook, which imports modules of this package. Import it first, so that the hook
# never meets a half-imported module.
import peft  # noqa: F401
