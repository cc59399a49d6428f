"""Triton kernels of the adapted linear, y = [x|v] [W|B]ᵀ; they import torch and triton, and of lorasb only `compat`.

Entry points: `linear` (dense weights), `linear_quantized` (4 bits) and `weight_gradient`. Kernels, most with the code
that gets from tensors to their launches: `low_rank` with `projection`, `extended_gemm`, `tma_gemm`, `row_cores`,
`dequantize_4bit`, `gemm_4bit`, `weight_gradient`, which share `device_functions`; and `operands`, `workspace` and
`launcher`. `prepared_linear` repeats a dense layer's launches from what `prepared_launch` keeps. Path and blocks of a
call: `plan` and `block_sizes`. Importing this package imports none of them.
"""
