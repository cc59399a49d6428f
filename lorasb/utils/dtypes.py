"""Groups of dtypes that several floors ask for."""

from __future__ import annotations

import torch

HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)  # what R may be stored in
FLOATS = (*WIDE, *HALVES)  # what x, W, A and B may have
QUANTIZABLE = (torch.float32, *HALVES)  # what a weight may be quantized from, and dequantized to
