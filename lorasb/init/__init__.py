"""Initialisation: gradients of the targets, their signs, a truncated SVD, and A, R, B in place."""

from .ranks import RankSuggestion
from .report import InitReport, LayerReport
from .run import initialize
from .schedule import first_step_lr
from .signbits import SignBits

__all__ = ["InitReport", "LayerReport", "RankSuggestion", "SignBits", "first_step_lr", "initialize"]
