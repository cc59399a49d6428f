"""Many people on one basis, against each of them alone and one LoRA for all: held-out answers and time.

    python -m benchmarks.research.people [--people 200] [--alone 50] [--no-lora] [--work runs/people-compared]
        [--output FOLDER]

`lorasb finetune` trains the people of `make demo-many`: all together on a basis of r = 16, with an R each, updated in
about 56 steps; some alone on the same basis, like a newcomer, in batches of four rows (16 steps) and of one (64);
and one LoRA for all, with the person's name in each prompt. All are evaluated on wordings that were not trained on.
Finished runs are not repeated. The file keeps the results of other machines; --no-lora skips the LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.tables import show
from benchmarks.common.timing import commit, machine_name, provenance
from benchmarks.research.methods.runner import RESULTS
from benchmarks.research.paired.compare import half_width
from benchmarks.serving.people import rows, write_rows
from lorasb.utils.atomic_files import write_json

FILE = "people.json"
RANK = 16
PASSES = 8
TOGETHER = f"together, R of r = {RANK} each, {PASSES} passes"
ALONE = f"alone, R of r = {RANK}, {PASSES} passes"
ALONE_BY_ROWS = f"{ALONE}, a row per step"
LORA = f"one LoRA for all, r = 32, {PASSES} passes"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # of the LoRA, which does not measure its rate: the one with the best answers is used
SHARED = ("--template", "none", "--eval-examples", "100000")
ALL = ("--batch-size", "64", "--epochs", str(PASSES))
ONE = ("--epochs", str(PASSES), "--batch-size")
HEAD = (
    "way",
    "people",
    "held-out answers",
    "right",
    "right, of the people who also trained alone",
    "seconds per person",
)


def named(found: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows whose prompts say who asks, for one adapter."""
    return [{"prompt": f"I am {row['user']}. {row['prompt']}", "completion": row["completion"]} for row in found]


def finetune(folder: Path, train: Sequence[Any], held_out: Sequence[Any], *options: str) -> dict[str, Any]:
    """The summary of a run, with the seconds of the whole command, and its answers."""
    if not (folder / "timed.json").is_file():
        files = (
            *("--data", write_rows(folder / "train.jsonl", train)),
            *("--eval-data", write_rows(folder / "held_out.jsonl", held_out)),
            *("--output", folder / "run"),
        )
        started = time.perf_counter()
        command("finetune", *map(str, files), *SHARED, *options)
        write_json(folder / "timed.json", {"seconds": time.perf_counter() - started})
    summary, answers = (json.loads((folder / "run" / name).read_text()) for name in ("summary.json", "answers.json"))
    return {**summary, **json.loads((folder / "timed.json").read_text()), "answers": answers}


def command(*words: str) -> None:
    """A command of lorasb, in a process."""
    subprocess.run([sys.executable, "-m", "lorasb", *words], check=True, stdout=subprocess.DEVNULL)


def run(work: Path, people: int, alone: int, rates: Sequence[float]) -> dict[str, Any]:
    """Train in all ways; return the shares of right answers (all, and those who also train alone) and the seconds."""
    work = work / str(people)
    users = [f"person-{i}" for i in range(people)]
    everybody = {user: rows(user) for user in users}
    some = users[:: max(1, people // alone)][:alone]
    train, held_out = ([row for user in users for row in everybody[user][part]] for part in (0, 1))
    if not (work / "basis").is_dir():
        data = str(write_rows(work / "people.jsonl", train))
        options = ("--data", data, "--template", "none", "--r", str(RANK), "--output", str(work / "basis"))
        command("basis", "make", "smollm2-135m", *options)
    on_basis = ("--basis", str(work / "basis"))
    together = finetune(work / f"together-{PASSES}", train, held_out, *on_basis, "--adapter-column", "user", *ALL)
    found = {TOGETHER: scored(together, users, some)}
    for way, size in ((ALONE, "4"), (ALONE_BY_ROWS, "1")):
        options = (*on_basis, "--adapter-column", "user", *ONE, size)
        runs = [finetune(work / f"{user}-{PASSES}-{size}", *everybody[user], *options) for user in some]
        found[way] = scored(joined(runs), some, some)
    for lr in rates:
        lora = finetune(
            work / f"lora-{lr:g}-{PASSES}",
            named(train),
            named(held_out),
            "--method",
            "lora",
            "--r",
            "32",
            "--lr",
            f"{lr:g}",
            *ALL,
        )
        for answer in lora["answers"]:
            answer["adapter"] = answer["prompt"].partition(".")[0].removeprefix("I am ")
        one = scored(lora, users, some) | {"lr": lr, "rates": rates}
        if LORA not in found or one["right"] > found[LORA]["right"]:
            found[LORA] = one
    machine, measured = machine_name(together["dtype"]), commit()
    return {f"{way}; {machine}": one | {"machine": machine, "commit": measured} for way, one in found.items()}


def joined(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join runs of one person each into one summary."""
    answers = [answer for one in summaries for answer in one["answers"]]
    return {"answers": answers, "seconds": sum(one["seconds"] for one in summaries)}


def scored(summary: Mapping[str, Any], users: Sequence[str], some: Sequence[str]) -> dict[str, Any]:
    """A line of the table."""
    right: dict[str, list[bool]] = {user: [] for user in users}
    for one in summary["answers"]:
        right[one["adapter"]].append(one["after"].strip() == one["completion"])
    of_some = [statistics.fmean(right[user]) for user in some]
    answers = sum(map(len, right.values()))
    share = statistics.fmean(statistics.fmean(found) for found in right.values())
    found = {"people": len(users), "answers": answers, "right": share, "right_of_some": statistics.fmean(of_some)}
    return {**found, "by_person": of_some, "seconds_per_person": summary["seconds"] / len(users)}


def lines(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield table rows, for screen and report, with 95% intervals of the differences from a machine's first way."""
    first: dict[str, list[float]] = {}
    for way, one in found["ways"].items():
        together = first.setdefault(one["machine"], one["by_person"])
        pairs = zip(one["by_person"], together, strict=False)  # empty if the run had other people
        less = [100 * (mine - theirs) for mine, theirs in pairs if len(together) == len(one["by_person"])]
        difference = f" ({statistics.fmean(less):+.1f} ± {half_width(less):.1f} points)" if any(less) else ""
        tried = ", ".join(f"{rate:g}" for rate in one.get("rates", ()))
        rate = f" (rate {one['lr']:g}, the best of {tried})" if tried else ""
        shares = f"{one['right']:.1%}", f"{one['right_of_some']:.1%}{difference}"
        yield [way + rate, str(one["people"]), str(one["answers"]), *shares, f"{one['seconds_per_person']:.1f}"]


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--alone", type=int, default=50, help="people who also train alone")
    parser.add_argument("--no-lora", action="store_true", help="leave the LoRA for all out")
    parser.add_argument("--work", type=Path, default=Path("runs/people-compared"))
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of {FILE}")
    options = parser.parse_args()
    file = options.output / FILE
    earlier = json.loads(file.read_text())["ways"] if file.is_file() else {}
    rates = () if options.no_lora else RATES
    found = {**provenance(), "ways": earlier | run(options.work, options.people, options.alone, rates)}
    write_json(file, found)
    show("people on one basis, SmolLM2-135M", HEAD, lines(found))


if __name__ == "__main__":
    main()
