"""Adapter files: reading, checking and sharing them, the model card, the base's fingerprint.

Works on tensors, paths and dictionaries; knows no module, layer or PEFT class. Uses utils and constants.
"""
