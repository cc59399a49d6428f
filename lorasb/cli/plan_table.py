"""What `lorasb plan` prints: where the bytes of a run go, whether they fit, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from ..init.gradients.cost_model import gb
from ..recipes.planning.planner import SAMPLES, Plan

HOLES = 0.1  # share of a step's peak that malloc holds, from which a way to have it back is told


def shown(found: Plan, better: list[tuple[str, Plan]]) -> RenderableType:
    """The table, and sentences below it; `better`: changes with their plans, where the run does not fit."""
    return Group(_table(found), *_sentences(found, better))


def _table(found: Plan) -> Table:
    request = found.request
    what = f"{request.batch} x {request.seq} tokens" + (", checkpointing" if request.checkpointing else "")
    table = Table(title=f"{request.model}: a step of {what}, base in {request.bits} bits", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, size in _rows(found):
        table.add_row(name, gb(size))
    table.add_section()
    table.add_row("[bold]peak of a training step[/]", f"[bold]{gb(found.step)}[/]")
    table.add_row(f"peak of the initialization, {SAMPLES} samples", gb(found.initialization))
    table.add_row(_place(found), gb(found.available))
    return table


def _rows(found: Plan) -> Iterator[tuple[str, float]]:
    """Those that are there."""
    rows = {
        "base model": found.base,
        "A and B, frozen": found.factors,
        f"R: {found.trained:,} trained numbers": found.cores,
        "gradients and AdamW's moments": found.optimizer,
        "activations kept for backward": found.saved,
        "temporaries at the worst moment": found.temporary,
        "one dequantized weight": found.scratch,
        "held by the allocator" + ("" if found.asked else ", about"): found.reserve,
        "CUDA context and kernels" if found.request.card else "kernels": found.context,
    }
    return ((name, size) for name, size in rows.items() if size)


def _place(found: Plan) -> str:
    return found.request.card.title if found.request.card else "this machine"


def _sentences(found: Plan, better: list[tuple[str, Plan]]) -> Iterator[str]:
    if found.fits:
        yield f"[green]It fits[/]: {gb(found.available - found.needed)} are left."
    else:
        yield f"[red]It does not fit[/]: {gb(found.needed - found.available)} are missing."
        for change, other in better:
            yield f"It does with [bold]{change}[/]: {gb(other.needed)}."
        if not better:
            yield "Nothing in its options makes it fit: take a smaller model, or several cards."
    if found.request.card is None and found.reserve > HOLES * found.step:
        yield (
            f"{gb(found.reserve)} are holes in malloc's heap: MALLOC_MMAP_THRESHOLD_=65536 in the environment gives "
            "them back, and makes steps slower."
        )
    where = "at the card's peak, which no step reaches" if found.request.card else "by the speed of its products here"
    yield f"A step has {found.flops:.2g} operations: {found.seconds:.2g} s {where}."
