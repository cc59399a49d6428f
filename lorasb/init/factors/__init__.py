"""From ΣG to A, R and B: the truncated SVD of sign(ΣG), writing into layers with rollback, and the cache of signs."""
