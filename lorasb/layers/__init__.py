"""The adapter layers: `LoRASBLinear` over a frozen base, groups of layers that share an input, 4-bit layers, experts.

Imports functional, checkpoints, quantization and what is below them; never tuner or init.
"""

# Importing peft runs our registration hook, which imports modules of this package. Done here, before any of them has
# started to import, it cannot meet one that is only half imported.
import peft  # noqa: F401
