"""Serving: many adapters in one batch."""
