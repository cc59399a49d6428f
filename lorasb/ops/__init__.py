"""The torch ops: schema, fake kernel and autograd formula, shared by all backends, and the choice of backend."""
