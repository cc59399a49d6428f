"""The paper's tables and figures at this scale, and others that it lacks: each a table, a picture and findings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research.methods import runner
from benchmarks.research.methods.grid import SGD, TASKS, WARMUP
from benchmarks.research.paper import ablations, curves, lengths, overhead, scale
from benchmarks.research.paper.ablations import ABLATIONS, COUNTS, LR, NOISES, Ablation, render, results
from benchmarks.research.paper.energy import loss_of
from benchmarks.research.reporting.markdown import picture, table, where_rows
from lorasb.init import first_step_lr


def section(rows: Sequence[Row], folder: Path) -> list[str]:
    """Return the section on everything that was run, and write its pictures and figure-2.csv."""
    out = ["## The paper's tables and figures at this scale", ""]
    out += ["Each is `python -m benchmarks.research.paper NAME --data-dir DATA`, with NAME as in its heading.", ""]
    for part in (
        figure_2,
        *(_ablation(name) for name in ("starts", "samples", "orthonormal")),
        table_7,
        costs,
        theorem,
    ):
        out += [*part(rows, folder), ""]
    out += ["## Beyond the paper", ""]
    for part in (
        step_lengths,
        *(_ablation(name) for name in ("start", "update", "subspace", "again", "rounding", "cola")),
        energy,
    ):
        out += [*part(rows, folder), ""]
    return out


def figure_2(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield the training losses."""
    if lines := curves.render(rows, curves.read(folder / runner.CURVES), folder):
        yield from ("### Figure 2: training loss of LoRA-SB and LoRA-XS (`curves`)", "")
        yield from (
            "Each method at the best rate of its sweep, mean of three seeds, test runs, in nats per token (CoLA: per "
            "example).",
            "",
        )
        yield from table(curves.HEAD, curves.ends(lines))
        mine = [row for row in rows if row["split"] == "test" and row["method"] in curves.COLORS]
        yield from ("", where_rows(mine))
        yield from picture("Training loss of LoRA-SB and LoRA-XS", "figure-2.png")


def _ablation(name: str) -> Callable[[Sequence[Row], Path], Iterator[str]]:
    def part(rows: Sequence[Row], folder: Path) -> Iterator[str]:
        ablation = ABLATIONS[name]
        if not (lines := render(name, rows, folder)):
            return
        yield from (f"### {ablation.title} (`{name}`)", "")
        yield f"{ablation.size}; mean ± standard deviation over seeds:"
        yield ""
        yield from table(ablations.head(ablation), map(ablations.shown, lines))
        mine = [row for variant in ablation.variants for row in results(variant, rows).values()]
        yield from ("", where_rows(mine))
        if name in NOTES:
            yield from ("", NOTES[name])
        if name == "rounding":
            yield from ("", begun(ablation, rows))
        yield from picture(ablation.title, f"{ablation.file}.png")

    return part


ETA = first_step_lr(LR, round(WARMUP * TASKS["chain_sum"].steps))
NOTES = {
    "starts": f"ΔW's entries are ±η = {ETA:.3g}: noise of 1e-5 is {1e-5 / ETA:.2f} η, of 1e-2 {1e-2 / ETA:.0f} η.",
    "orthonormal": "The first step is the same for all. With B = U Σ, the change of W by a step of R is scaled by Σ.",
    "update": "Both at the same rate. R starts at η Σ, with the Σ of the mean gradient or of its sign.",
    "subspace": "Each at the best rate of a sweep with one seed; W with B = U also at the neighboring rates. "
    "LoRA-XS itself has B = U Σ of W: its steps are longer in W's leading directions. The length of AdamW's steps does "
    "not depend on the gradient, and factors that hold less of the gradient do best at a higher rate.",
    "rounding": "R corrected: Bᵀ(W − Q)Aᵀ/s is added to the start of R: within the subspaces, it is the best "
    "approximation of NF4's rounding error of W (`starts.corrected`).",
    "again": "What R has learned is merged into the bf16 base (and rounded), AdamW's moments are reset, and the first "
    "step is simulated again from 32 other samples with η at the schedule's peak; there is no second warm-up.",
}


def begun(ablation: Ablation, rows: Sequence[Row]) -> str:
    """Return the losses at the start of training, for the variants that differ there."""
    means = {
        variant.label: statistics.fmean(float(row["loss_before"]) for row in found)
        for variant in ablation.variants
        if variant.options and (found := list(results(variant, rows).values()))
    }
    return f"Loss at the start of training: {', '.join(f'{label} {mean:.4f}' for label, mean in means.items())}."


def table_7(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield what the initialization costs."""
    if lines := overhead.render(rows, folder):
        yield from ("### Table 7: what the initialization costs (`overhead`)", "")
        yield from table(overhead.HEAD, (overhead.shown(line) for line in lines))
        yield ""
        yield "Overhead: LoRA-SB's seconds minus LoRA-XS's, on one core. An epoch is one pass over the full training"
        yield "set, at this run's seconds per example (gsm8k: at most 192 tokens); generated tasks have no such set."
        yield from (
            "The paper's text says 1.1% to 1.3% of an epoch, its Table 7 1.10%, 1.49% and 1.32%.",
            "",
            where_rows(rows),
        )
        yield from picture("Cost of the initialization as a share of an epoch", "table-7.png")


def costs(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield Table 8, which is counted, not measured."""
    found = read_csv(folder / "costs.csv")
    if not found:
        return
    yield from ("### Table 8: parameters, MACs and FLOPs of four architectures (`costs`)", "")
    yield from ("Counted on the meta device for 256 tokens, in billions; *: differs in more than the last digit.", "")
    head = ["model", "method", "r", "trained", "MACs", "published", "FLOPs", "published"]
    yield from table(head, (_cost(row) for row in found), left=2)
    yield ""
    for model, note in dict.fromkeys((row["model"], row["note"]) for row in found if row["note"]):
        yield f"- {model}: {note}."


def _cost(row: Row) -> list[str]:
    return [
        row["model"],
        row["method"],
        row["r"],
        f"{int(row['trained']):,}",
        f"{float(row['macs']) / 1e9:,.2f}",
        f"{float(row['paper_macs']) / 1e9:,.2f}{'' if row['within_a_digit'] == 'True' else ' *'}",
        f"{float(row['flops']) / 1e9:,.2f}",
        f"{float(row['paper_flops']) / 1e9:,.2f}",
    ]


def theorem(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield the check of Theorem 5."""
    found = read_csv(folder / "scale.csv")
    if not found:
        return
    yield from ("### Theorem 5: training does not depend on s (`scale`)", "")
    about = (
        f"{TASKS['cola'].name}, r={scale.R}, {scale.STEPS} steps of {scale.BATCH}, fp32; loss of the last step by s:"
    )
    yield from (about, "")
    yield from table(["", *(f"s = {s:g}" for s in scale.SCALES), "largest difference of any step"], _by_way(found))
    yield from ("", where_rows(found))
    yield from picture("Training loss for s = 0.1, 1 and 10", "scale.png")


def _by_way(found: Sequence[Row]) -> Iterator[list[str]]:
    """Yield one row per way: the last step's loss by s, and the largest difference between losses of a step."""
    for way in dict.fromkeys(row["way"] for row in found):
        losses: dict[str, list[float]] = {}
        for row in found:
            if row["way"] == way:
                losses.setdefault(row["s"], []).append(float(row["loss"]))
        apart = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
        yield [way, *(f"{values[-1]:.5f}" for values in losses.values()), f"{apart:.1e}"]


def step_lengths(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield the lengths of the starts that `longest_start` limits."""
    found = read_csv(folder / lengths.FILE)
    if not found:
        return
    yield from ("### Length of the whole first step, in AdamW's steps of R (`lengths`)", "")
    task = TASKS[found[0]["task"]]
    yield from (f"{task.name}, {task.model}, 32 samples; ‖Σ_r‖/r of sign(G), counted as at least 1, over layers:", "")
    yield from table(list(lengths.HEAD), (lengths.shown(line) for line in found))
    yield from ("", where_rows(found))


def energy(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """Yield the energy in each start's subspace against the loss."""
    found = read_csv(folder / "energy.csv")
    if not found:
        return
    yield from ("### Energy captured against the loss reached (`energy`)", "")
    head = ["start", "r", "lr", "seeds", "energy of G", "energy of sign(G)", "loss"]
    order = sorted(found, key=lambda row: (int(row["r"]), float(row["loss"])))
    yield from table(head, (_energy(row) for row in order))
    yield from ("", where_rows(found), "", *_by_matrix(found), *_by_loss_of_energy(found))
    yield from picture("Energy of unseen samples' gradient in the subspace against the loss", "energy.png")


def _energy(row: Row) -> list[str]:
    return [
        row["start"],
        row["r"],
        f"{float(row['lr']):g}",
        row["seeds"],
        f"{float(row['energy_grad']):.1%}",
        f"{float(row['energy_sign']):.1%}",
        loss_of(row),
    ]


def _by_matrix(found: Sequence[Row]) -> Iterator[str]:
    """Yield one line per rank: energy and loss with factors of W, sign(G) and G, and which ended best."""
    by_start = {row["start"]: row for row in found}
    for r in TASKS["chain_sum"].ranks:
        rows = [by_start[start] for name in ("LoRA-XS", "LoRA-SB", SGD) if (start := f"{name}, r={r}") in by_start]
        if len(rows) == 3:
            energies, losses = ([float(row[name]) for row in rows] for name in ("energy_grad", "loss"))
            kept, ends = ", ".join(f"{e:.1%}" for e in energies), ", ".join(f"{loss:.3f}" for loss in losses)
            least = energies[losses.index(min(losses))]
            yield (
                f"- r={r}: factors of W, sign(G) and G keep {kept} of G's energy and end at losses of {ends}; the "
                f"factors that keep {least:.1%} have the lowest loss."
            )


def _by_loss_of_energy(found: Sequence[Row]) -> Iterator[str]:
    """Yield a line each for noise and for samples: how much of G the sign's factors keep, and the loss."""
    for kind, first, last in (("noise", min(NOISES), max(NOISES)), ("samples", max(COUNTS), min(COUNTS))):
        rows = [row for end in (first, last) for row in found if row["start"].startswith(f"{kind} {end},")]
        if len(rows) == 2:
            most, least = (f"{float(row['energy_grad']):.1%}" for row in rows)
            before, after = (f"{float(row['loss']):.3f}" for row in rows)
            kept = f"factors of sign(G) keep {most} and {least}"
            yield f"- {kind}, {first} to {last}: {kept} of G's energy, and end at losses of {before} and {after}."
