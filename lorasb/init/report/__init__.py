"""What an initialization says of itself: energies by layer, suggested ranks, plots, provenance, skipped modules."""

from .init_report import InitReport as InitReport
from .layer_report import LayerReport as LayerReport
from .rank_allocation import RankSuggestion as RankSuggestion
