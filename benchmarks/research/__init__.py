"""Experiments that take hours: every method side by side, the tables of the paper, paired seeds, and the report."""
