"""Inside a training run: initialization from the Trainer's own data, and parameter groups for an optimizer."""
