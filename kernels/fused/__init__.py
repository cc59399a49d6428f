"""Triton kernels of the adapted linear, y = [x|v] [W|B]ᵀ; they import torch and triton, and of lorasb only `compat`.

Entry points: `linear` (dense weights), `linear_quantized` (4 bits) and `weight_gradient`. Kernels, most with the code
that launches them: `low_rank` with `projection`, `extended_gemm`, `tma_gemm`, `row_cores`, `dequantize_4bit`,
`gemm_4bit` and `weight_gradient`; they share `device_functions`, `operands` and `launcher`.
`prepared_linear` repeats a dense layer's launches, which `prepared_launch` prepares. `plan` and `block_sizes` choose
the path and blocks of a call. Importing this package imports none of them.
"""
