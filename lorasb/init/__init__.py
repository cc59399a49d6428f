"""LoRA-SB initialization: ΣG of every target, the truncated SVD of its sign, and A, R and B written into the layers."""

from .auto_rate import first_step_lr as first_step_lr
from .basis_fit import BasisFit as BasisFit
from .basis_fit import basis_fit as basis_fit
from .init_report import InitReport as InitReport
from .init_report import LayerReport as LayerReport
from .init_report import RankSuggestion as RankSuggestion
from .initialization import initialize as initialize
from .several_tasks import TasksReport as TasksReport
