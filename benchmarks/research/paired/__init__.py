"""Starts and optimizers of LoRA-SB in pairs of runs, with enough seeds and held-out examples to tell them apart."""
