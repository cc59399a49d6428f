"""Initialization, a training step and start-up of a real model, each against a peer."""
