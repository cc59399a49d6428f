"""`LoRASBConfig` and PEFT's names for the method; imports checkpoints and utils."""

import peft as peft  # first: it registers the tuner, which imports the modules of this package
