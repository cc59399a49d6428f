"""LoRA-SB initialization: ΣG of every target, the truncated SVD of its sign, and A, R and B written into the layers."""

from .basis_fit import BasisFit, basis_fit
from .init_report import InitReport, LayerReport, RankSuggestion
from .initialization import initialize
from .plan import first_step_lr
from .several_tasks import TasksReport
from .svd import SignBits

__all__ = [
    "BasisFit",
    "InitReport",
    "LayerReport",
    "RankSuggestion",
    "SignBits",
    "TasksReport",
    "basis_fit",
    "first_step_lr",
    "initialize",
]
