"""Adapted layers against the bare base, the eager chain and PEFT: the suite for GPUs, and 16-bit bases on CPUs."""
