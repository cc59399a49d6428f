"""Groups of dtypes."""

from __future__ import annotations

import torch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)  # allowed for R
FLOATS = (*WIDE, *SIXTEEN_BIT)  # allowed for x, W, A and B
QUANTIZABLE = (torch.float32, *SIXTEEN_BIT)  # allowed for a weight before quantization and after dequantization
