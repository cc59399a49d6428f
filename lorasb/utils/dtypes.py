"""Groups of dtypes."""

from __future__ import annotations

import torch

HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)  # allowed for R
FLOATS = (*WIDE, *HALVES)  # allowed for x, W, A and B
QUANTIZABLE = (torch.float32, *HALVES)  # allowed for a weight before quantization and after dequantization
