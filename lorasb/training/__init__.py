"""Training-loop integration: initialization from the Trainer's data, and parameter groups for optimizers."""
