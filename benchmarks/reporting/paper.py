"""The paper's tables and figures at this scale, and three that it lacks: each a table, a picture and what is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.methods.grid import TASKS
from benchmarks.paper import scale
from benchmarks.paper.ablations import ABLATIONS, LR, R, size
from benchmarks.reporting.markdown import Row, picture, plus_minus, read_csv, table, where_rows


def section(rows: Sequence[Row], folder: Path) -> list[str]:
    """Everything that has been run."""
    out = ["## The paper's tables and figures at this scale", ""]
    out += ["Each is `python -m benchmarks.paper NAME --data-dir DATA`, with NAME as in its heading.", ""]
    for part in (curves, *(_ablation(name) for name in ("starts", "samples", "orthonormal")), overhead, costs, theorem):
        out += [*part(rows, folder), ""]
    out += ["## What the paper does not ask", ""]
    for part in (*(_ablation(name) for name in ("update", "eta", "again")), energy):
        out += [*part(rows, folder), ""]
    return out


def curves(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Figure 2."""
    found = read_csv(folder / "figure-2.csv")
    if not found:
        return
    yield from ("### Figure 2: training loss of LoRA-SB and LoRA-XS (`curves`)", "")
    lines = []
    for task, r in dict.fromkeys((row["task"], row["r"]) for row in found):
        ends = []
        for method in ("LoRA-SB", "LoRA-XS"):
            losses = [float(row["loss"]) for row in found if (row["task"], row["method"]) == (task, method)]
            ends += [f"{losses[0]:.3f}", f"{sum(losses[-5:]) / 5:.3f}"]
        lines.append([task, r, *ends])
    head = ["task", "r", "LoRA-SB, first point", "LoRA-SB, last five", "LoRA-XS, first point", "LoRA-XS, last five"]
    yield from table(head, lines)
    yield from picture("Training loss of LoRA-SB and LoRA-XS", "results/figure-2.png")


def _ablation(name: str) -> Callable[[Sequence[Row], Path], Iterator[str]]:
    def part(rows: Sequence[Row], folder: Path) -> Iterator[str]:
        ablation = ABLATIONS[name]
        found = read_csv(folder / f"{ablation.file}.csv")
        if not found:
            return
        yield from (f"### {ablation.title} (`{name}`)", "")
        yield f"{size()}; r={R}, lr {LR:g} where nothing else is said; mean ± standard deviation over seeds:"
        yield ""
        head = ["", "r", "lr", "seeds", "loss", "over the plain run of the same seed", "exact match"]
        yield from table(head, (_variant(row) for row in found))
        names = {variant.name for variant in ablation.variants}
        mine = [
            row
            for row in rows
            if row["variant"] in names and row["task"] == "chain_sum" and row["split"] == "validation"
        ]
        yield from ("", where_rows(mine))
        yield from picture(ablation.title, f"results/{ablation.file}.png")

    return part


def _variant(row: Row) -> list[str]:
    numbers = {name: float(row[name]) for name in ("loss", "loss_sd", "over", "over_sd", "score", "score_sd")}
    over = f"{numbers['over']:+.3f} ± {numbers['over_sd']:.3f}" if row["variant"] != row["against"] else ""
    return [
        row["variant"], row["r"], f"{float(row['lr']):g}", row["seeds"],
        plus_minus(numbers["loss"], numbers["loss_sd"]), over, plus_minus(numbers["score"], numbers["score_sd"]),
    ]  # fmt: skip


def overhead(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Table 7."""
    found = read_csv(folder / "table-7.csv")
    if not found:
        return
    yield from ("### Table 7: what the initialisation costs (`overhead`)", "")
    head = ["task", "r", "runs", "LoRA-SB, s", "LoRA-XS, s", "overhead, s", "an epoch", "overhead / epoch"]
    yield from table(head, (
        [row["task"], row["r"], row["runs"], f"{float(row['init_seconds']):.1f}",
         f"{float(row['init_seconds_lora_xs']):.1f}", f"{float(row['overhead_seconds']):.1f}",
         f"{int(row['epoch_samples']):,} samples, {float(row['epoch_seconds']):,.0f} s", f"{float(row['share']):.2%}"]
        for row in found
    ))  # fmt: skip
    yield from (
        "",
        "Medians over runs on one core; an epoch is seconds a step times its steps. The paper: 1.1% to 1.3%.",
    )
    yield from picture("Cost of the initialisation as a share of an epoch", "results/table-7.png")


def costs(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Table 8."""
    found = read_csv(folder / "costs.csv")
    if not found:
        return
    yield from ("### Table 8: parameters, MACs and FLOPs of four architectures (`costs`)", "")
    head = ["model", "method", "r", "trained", "GMACs", "published", "within a digit", "note"]
    yield from table(head, (
        [row["model"], row["method"], row["r"], f"{int(row['trained']):,}", f"{int(row['macs']) / 1e9:,.2f}",
         f"{float(row['paper_macs']) / 1e9:,.2f}", row["within_a_digit"], row["note"]]
        for row in found
    ), left=2)  # fmt: skip


def theorem(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Theorem 5."""
    found = read_csv(folder / "scale.csv")
    if not found:
        return
    yield from ("### Theorem 5: training does not depend on s (`scale`)", "")
    lines = []
    for way in dict.fromkeys(row["way"] for row in found):
        losses: dict[str, list[float]] = {}
        for row in found:
            if row["way"] == way:
                losses.setdefault(row["s"], []).append(float(row["loss"]))
        apart = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
        lines.append([way, *(f"{values[-1]:.5f}" for values in losses.values()), f"{apart:.1e}"])
    about = (
        f"{TASKS['cola'].name}, r={scale.R}, {scale.STEPS} steps of {scale.BATCH}, fp32; loss of the last step by s:"
    )
    yield from (about, "")
    yield from table(["", *(f"s = {s:g}" for s in scale.SCALES), "largest difference of any step"], lines)
    yield from picture("Training loss for s = 0.1, 1 and 10", "results/scale.png")


def energy(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Energy against score."""
    found = read_csv(folder / "energy.csv")
    if not found:
        return
    yield from ("### Energy captured against the loss reached (`energy`)", "")
    head = ["start", "r", "lr", "seeds", "energy of G", "energy of sign(G)", "loss"]
    order = sorted(found, key=lambda row: (int(row["r"]), float(row["loss"])))
    yield from table(head, (
        [row["start"], row["r"], f"{float(row['lr']):g}", row["seeds"], f"{float(row['energy_grad']):.1%}",
         f"{float(row['energy_sign']):.1%}", f"{float(row['loss']):.3f}"]
        for row in order
    ))  # fmt: skip
    yield from picture("Energy of unseen samples' gradient in the subspace against the loss", "results/energy.png")
