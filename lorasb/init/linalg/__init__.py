"""Linear algebra of the initialization: packed sign matrices and their truncated SVD. Knows tensors, not layers."""
