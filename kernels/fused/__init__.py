"""Triton kernels of the adapted linear, y = [x|v] [W|B]ᵀ; they import torch and triton and nothing of lorasb.

`launch` is the way in: it sizes workspaces, picks configurations and launches. `prep` and `gemm` hold the kernels,
`parts` what both use, `configs` and `plan` the choice of blocks and of a path. Importing this package imports none.
"""
