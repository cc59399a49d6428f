"""The backends `eager`, `cpp` and `triton`, which compute the ops of `lorasb.ops`; importing them imports no triton."""

from ..ops.registry import backend as backend
from . import cpp, eager, triton

for _each in (eager, cpp, triton):
    _each.register()
