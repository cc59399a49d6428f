"""LoRA-SB initialization: sum each target's gradients (ΣG), take the truncated SVD of the sign, write A, R and B."""

from .auto_rate import first_step_lr as first_step_lr
from .init_report import InitReport as InitReport
from .init_report import LayerReport as LayerReport
from .init_report import RankSuggestion as RankSuggestion
from .initialization import BasisFit as BasisFit
from .initialization import TasksReport as TasksReport
from .initialization import basis_fit as basis_fit
from .initialization import initialize as initialize
