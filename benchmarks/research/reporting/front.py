"""Draw the pictures of the README and the documentation from committed results, for light and dark backgrounds.

python -m benchmarks.research.reporting.front   # docs/NAME-light.png and docs/NAME-dark.png
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.csv_files import read_csv
from benchmarks.common.figures import panels, save_panels
from benchmarks.research.methods import runner
from benchmarks.research.methods.grid import SEEDS
from benchmarks.research.methods.pictures import plain_log
from benchmarks.research.paired.compare import spots_of
from benchmarks.research.paired.grid import ROWS
from benchmarks.research.reporting.charts import draw_spots
from benchmarks.research.reporting.markdown import read_json
from benchmarks.serving import vllm
from benchmarks.serving.economics import Sizes
from lorasb.app.results import smoothed
from lorasb.init.initialization import LONGEST_START
from lorasb.utils.plotting import GRAD, MUTED, SIGN

DOCS = runner.BENCHMARKS.parent / "docs"
INKS = {"light": "#1b1b1b", "dark": "#e6e6e6"}  # text color on each background
TEXT, SMALL = 17, 15  # points, at a width of 7.6 inches: legible on a phone
MODEL, RANK, COUNT = "Mistral-7B", 16, 1000
STEPS = 75  # of the training curves


def megabytes(axis: Any, ink: str) -> str:
    """Draw the size of one adapter among a thousand, including its share of the basis."""
    sizes = Sizes(MODEL)
    bars = {
        "LoRA, r = 32": sizes.lora(32) / 1e6,
        "LoRA, r = 1": sizes.lora(1) / 1e6,
        f"R on a shared basis,\nr = {RANK}": sizes.on_basis(RANK, COUNT) / COUNT / 1e6,
    }
    axis.barh(list(bars), list(bars.values()), color=[MUTED, MUTED, SIGN], height=0.62)
    axis.set_xlim(0, 1.35 * max(bars.values()))
    axis.set_xticks([])
    for i, value in enumerate(bars.values()):
        text = f" {value:.0f} MB" if value > 100 else f" {value:.1f} MB"
        axis.text(value, i, text, va="center", fontsize=19, fontweight="bold", color=ink)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["left"]].set_visible(False)
    axis.set_xlabel(f"MB per adapter of {MODEL}, fp32")
    _, smallest, ours = bars.values()
    return f"{COUNT:,} adapters: each {smallest / ours:.0f}x smaller than the smallest LoRA"


def parameters(axis: Any, ink: str) -> str:
    """Draw every method's held-out loss against its number of trained parameters."""
    draw_spots(axis, list(spots_of(read_csv(runner.RESULTS / ROWS), "word_sequence_reversal by loss")), 9, 12, ink)
    axis.set_xlabel("trained parameters (word reversal, SmolLM2-135M)\nbars: 95% over seeds; hollow: span of two seeds")
    axis.set_ylabel("held-out loss")
    axis.legend(frameon=False, fontsize=SMALL, labelcolor=ink)
    return "LoRA-SB goes below LoRA's smallest size"


def tokens(axis: Any, ink: str) -> str:
    """Draw tokens per second in vLLM by the number of different adapters in a batch."""
    found, counts = read_json(runner.BENCHMARKS / "results" / vllm.FILE)["speed"], vllm.COUNTS
    most: list[float] = []  # tokens per second with the most adapters
    for way, text, color in ((vllm.PLUGIN, "R on one basis", SIGN), (vllm.STOCK, "plain LoRAs", GRAD)):
        speeds = [vllm.tokens_per_second(found[vllm.way_title(way, count)]) for count in counts]
        most.append(speeds[-1])
        axis.plot(counts, speeds, "o-", color=color, ms=9, lw=2.5)
        text = f"{text}, r = {vllm.RANK}"
        axis.annotate(text, (1, speeds[0]), xytext=(0, -24), textcoords="offset points", fontsize=SMALL, color=ink)
    bare = vllm.tokens_per_second(found[vllm.BARE])
    axis.axhline(bare, color=MUTED, lw=2, ls="--")
    axis.annotate(
        "no adapter",
        (counts[-1], bare),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
        color=ink,
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_yscale("log")
    axis.set_ylim(20, 2000)
    plain_log(axis.yaxis)
    axis.set_xlabel("different adapters in a batch of 64 (vLLM, two CPU cores)")
    axis.set_ylabel("tokens per second")
    return f"{counts[-1]} adapters: {most[0]:.0f} tokens per second, plain LoRAs {most[1]:.0f}"


def start(axis: Any, ink: str) -> str:
    """Draw the training loss, with its first point labeled."""
    rows = [row for row in read_csv(runner.RESULTS / "figure-2.csv") if row["task"] == "chain_sum"]
    firsts = []
    ours = f"LoRA-SB (start of up to {LONGEST_START:g} steps)"
    for name, text, color in (("LoRA-SB", ours, SIGN), ("LoRA-XS", "LoRA-XS (SVD of the weight)", GRAD)):
        losses = [float(row["loss"]) for row in rows if row["method"] == name]
        steps = [(i + 0.5) * STEPS / len(losses) for i in range(len(losses))]
        firsts.append(f"{losses[0]:.2f}")
        axis.plot(steps, losses, "-", color=color, lw=2.5, label=text)
        axis.plot(steps[0], losses[0], "o", color=color, ms=11)
        place = {"xytext": (-10, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axis.annotate(firsts[-1], (steps[0], losses[0]), color=ink, fontsize=SMALL, **place)
    axis.set_xlim(left=-8)
    axis.set_xticks(range(0, STEPS, 10))
    axis.set_xlabel(f"step (sums, r = {rows[0]['r']}, mean of {len(SEEDS)} seeds)")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False, fontsize=SMALL, labelcolor=ink)
    return f"LoRA-SB starts at {firsts[0]} instead of {firsts[1]}; both end level"


def bits(axis: Any, ink: str) -> str:
    """Draw the training loss with a 16-bit and a 4-bit base."""
    found = read_json(runner.BENCHMARKS / "results" / "four-bits-curve.json")
    for one in found["runs"]:
        color = SIGN if one["bits"] == 4 else GRAD
        losses = smoothed(tuple(one["train_losses"]))
        label = f"base in {one['bits']} bits" if one["seed"] == 0 else None
        axis.plot(range(1, len(losses) + 1), losses, color=color, lw=2.5, alpha=0.85, label=label)
        size, fill = (9, color) if one["bits"] == 4 else (15, "none")  # a ring around the dot, as the two coincide
        axis.plot(len(losses), one["eval_loss_after"], "o", color=color, ms=size, mfc=fill, mew=2)
    axis.set_xlabel("step (dots: held out)")
    axis.set_ylabel("training loss")
    axis.legend(frameon=False, fontsize=SMALL, labelcolor=ink)
    return "A 4-bit base ends at nearly the same loss"


PICTURES: dict[Callable[[Any, str], str], float] = {megabytes: 3.4, parameters: 4.6, tokens: 4.2, start: 4.2, bits: 4.2}


def main() -> None:
    """Draw each picture once per background."""
    for draw, height in PICTURES.items():
        for name, ink in INKS.items():
            figure, (axis,) = panels(1, 1, (7.6, height))
            title = draw(axis, ink)
            figure.suptitle(title, fontsize=18, color=ink)
            axis.tick_params(labelsize=TEXT if draw is megabytes else SMALL, colors=ink, which="both")
            axis.xaxis.label.set(fontsize=SMALL, color=ink)
            axis.yaxis.label.set(fontsize=SMALL, color=ink)
            for spine in axis.spines.values():
                spine.set_color(MUTED)
            figure.patch.set_alpha(0)
            axis.patch.set_alpha(0)
            save_panels(figure, [axis], DOCS / f"{draw.__name__}-{name}.png", grid=False)


if __name__ == "__main__":
    main()
