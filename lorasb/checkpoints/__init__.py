"""Adapter files: validation and reading, factors shared by checkpoints, the model card, the base model's fingerprint.

Works on tensors, paths and dictionaries, without modules or PEFT classes. Imports utils and constants alone.
"""
