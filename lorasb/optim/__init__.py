"""Optimizers for R: `lorasb.optim.Muon(lorasb.parameter_groups(model, lr=2e-2, other_lr=1e-3))`."""

from __future__ import annotations

from .muon import Muon

__all__ = ["Muon"]
