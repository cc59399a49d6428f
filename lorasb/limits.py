"""Limits that the configuration and the kernels share; importing this imports nothing."""

MAX_RANK = 256  # the largest r that a kernel takes
