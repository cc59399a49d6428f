"""Adapter files: validation and reading, factors shared by checkpoints, the model card, the base's fingerprint."""
