"""What this machine is good for, in a sentence: the models that its memory holds and an evening is enough for."""

from __future__ import annotations

import math

import psutil
import torch

from ...init.gradients.cost_model import EFFICIENCY, product_speed
from ...utils.precision import native

EVENING = 3 * 3600.0  # seconds
TOKENS = 1e6  # of training: 2,000 examples of 500
OPERATIONS = 4  # a parameter and token: forward, and backward for dx
WORKING_SHARE = 0.6  # of the memory that weights may take: the rest is a step's activations
BYTES = {"16": 2.0, "4": 0.6}  # a parameter, with embeddings that stay in 16 bits


def prospects() -> str:
    """The sentence that `lorasb doctor` ends with."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        sixteen, four = (_billions(WORKING_SHARE * memory / size) for size in BYTES.values())
        return (
            f"This machine is good for fine-tuning models of up to about {sixteen} billion parameters in 16 bits and "
            f"{four} in 4 bits on its GPU; lorasb plan MODEL says what one of them takes."
        )
    dtype = getattr(torch, native("cpu").name)
    in_time = EVENING * EFFICIENCY * product_speed(512, 2048, 2048, dtype, torch.device("cpu")) / (OPERATIONS * TOKENS)
    in_memory = WORKING_SHARE * psutil.virtual_memory().total / dtype.itemsize
    return (
        f"This machine is good for fine-tuning models of up to about {_billions(min(in_time, in_memory))} billion "
        "parameters on a million tokens in an evening, on its CPU; lorasb plan MODEL says what one of them takes."
    )


def _billions(parameters: float) -> str:
    """Rounded down to one digit: 0.7, 3, 20."""
    digit = 10.0 ** math.floor(math.log10(parameters))
    return f"{math.floor(parameters / digit) * digit / 1e9:g}"
