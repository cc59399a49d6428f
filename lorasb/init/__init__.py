"""LoRA-SB initialization: ΣG of every target, the truncated SVD of its sign, and A, R and B written into the layers."""

from .initialization import initialize
from .later_gradient import refresh
from .linalg.sign_bits import SignBits
from .report.init_report import InitReport
from .report.layer_report import LayerReport
from .report.rank_allocation import RankSuggestion
from .schedule import first_step_lr
from .several_tasks import TasksReport

__all__ = [
    "InitReport",
    "LayerReport",
    "RankSuggestion",
    "SignBits",
    "TasksReport",
    "first_step_lr",
    "initialize",
    "refresh",
]
