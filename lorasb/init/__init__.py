"""Initialisation: gradients of the targets, their signs, a truncated SVD, and A, R, B in place."""

from .report import InitReport, LayerReport
from .run import initialize
from .schedule import first_step_lr

__all__ = ["InitReport", "LayerReport", "first_step_lr", "initialize"]
