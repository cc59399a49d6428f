"""Examples of a run: generated, from files or from the hub by name; their tokens, batches and order."""
