"""Reports of an initialization: captured energy by layer, suggested ranks, plots, provenance and skipped modules."""

from .init_report import InitReport as InitReport
from .layer_report import LayerReport as LayerReport
from .rank_allocation import RankSuggestion as RankSuggestion
