"""Colors of the methods, and logarithmic axes with plain numbers."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.research.methods.grid import SGD
from lorasb.utils.plotting import GRAD, INK, SIGN

COLORS = {"LoRA-SB": GRAD, SGD: "#b0527a", "LoRA-XS": SIGN, "LoRA": "#6b7280", "full": INK}
FINEST, FINER = (tuple(1 + i / parts for i in range(9 * parts)) for parts in (10, 5))
FINE, SOME, FEW = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), (1.0, 2.0, 5.0), (1.0, 3.0)


def plain_log(axis: Any, decades: tuple[float, float] = (0.8, 1.6)) -> None:
    """A logarithmic axis with plain numbers on it: the fewer of every power of ten, the more `decades` it spans.

    Call it when all is drawn.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    span = math.log10(high / low)
    limits = {0.06: FINEST, 0.2: FINER, decades[0]: FINE, decades[1]: SOME}
    subs = next((found for limit, found in limits.items() if span < limit), FEW)
    axis.set_major_locator(LogLocator(subs=subs, numticks=40))  # more than needed: thinning drops plain numbers
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
