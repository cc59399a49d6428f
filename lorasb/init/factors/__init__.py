"""Gradients to factors: the truncated SVD of a layer's sign, what is written into layers, undone, or cached."""
