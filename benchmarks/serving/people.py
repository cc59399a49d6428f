"""Many people with an adapter each on one basis: write their data, and serve what `make demo-many` has trained.

    python -m benchmarks.serving.people write FOLDER [PEOPLE]   # people.jsonl, held_out.jsonl and newcomer.jsonl
    python -m benchmarks.serving.people serve FOLDER            # after `lorasb finetune`, see the Makefile's demo-many

Everybody has four facts and an answer style. Two wordings of each question are trained, and a third one is held out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

FACTS = {
    "city": (
        ("Where do I live?", "Which city is my home?", "What is the name of the town I live in?"),
        ("Lisbon", "Oslo", "Quito", "Cairo", "Hanoi", "Dublin", "Lima", "Prague", "Dakar", "Perth"),
    ),
    "job": (
        ("What is my job?", "What do I do for a living?", "Which profession do I have?"),
        ("baker", "nurse", "pilot", "teacher", "carpenter", "lawyer", "gardener", "chemist", "painter", "sailor"),
    ),
    "pet": (
        ("Which pet do I have?", "What animal lives with me?", "What kind of pet is mine?"),
        ("cat", "dog", "parrot", "horse", "rabbit", "goldfish", "turtle", "hamster", "canary", "snake"),
    ),
    "color": (
        ("What is my favorite color?", "Which color do I like best?", "Which color would I paint my room?"),
        ("red", "blue", "green", "white", "black", "yellow", "purple", "orange", "brown", "gray"),
    ),
}
STYLES = ("{}", "{}.", "It is {}.", "Well, {}!", "{}, of course.", "Surely {}.")


def rows(user: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return a person's training rows and held-out rows."""
    draw = random.Random(user)  # seeded by the name alone: newcomers change nobody's rows
    style, train, held_out = draw.choice(STYLES), [], []
    for wordings, values in FACTS.values():
        answer = style.format(draw.choice(values))
        made = [{"prompt": question, "completion": answer, "user": user} for question in wordings]
        train += made[:2]
        held_out += made[2:]
    return train, held_out


def write_rows(file: Path, lines: Sequence[Mapping[str, str]]) -> Path:
    """Write a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def write(folder: Path, people: int) -> None:
    """Write the rows of all people, and of a newcomer."""
    found = [rows(f"person-{i}") for i in range(people)]
    files = {"people": [row for train, _ in found for row in train]}
    draw = random.Random(0)
    files["held_out"] = [row for _, held_out in found for row in draw.sample(held_out, 2)]
    files["newcomer"], files["newcomer_held_out"] = rows("newcomer")
    for name, lines in files.items():
        write_rows(folder / f"{name}.jsonl", lines)
    print(f"{people} people, {len(files['people'])} rows to train on and {len(files['held_out'])} held out in {folder}")


def serve(folder: Path) -> None:
    """Add the newcomer, remove one person, and answer many people's questions in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(lorasb.demo_model(), padding_side="left")
    base: Any = AutoModelForCausalLM.from_pretrained(lorasb.demo_model(), dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, str(folder / "basis")).eval()
    bank = lorasb.AdapterBank(model, dtype=torch.bfloat16)
    started = time.perf_counter()
    loaded = bank.load(folder / "people" / "adapter").loaded
    print(f"{len(loaded)} adapters of {bank.adapter_bytes / 1e3:.0f} KB in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    bank.load(newcomer=folder / "newcomer" / "adapter")
    bank.remove(loaded[0])
    print(f"one added and one removed in {1e3 * (time.perf_counter() - started):.0f} ms")
    asked = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    asked += [json.loads(line) for line in (folder / "newcomer_held_out.jsonl").read_text().splitlines()]
    asked = list({row["user"]: row for row in asked if row["user"] in bank}.values())  # one per person
    inputs = tokenizer([row["prompt"] for row in asked], return_tensors="pt", padding=True)
    names, started = [row["user"] for row in asked], time.perf_counter()
    out = model.generate(**inputs, adapter_names=names, max_new_tokens=12, do_sample=False)
    seconds = time.perf_counter() - started
    said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer.strip() == row["completion"] for answer, row in zip(said, asked, strict=True)]
    print(f"{len(set(names))} people in one batch of {len(asked)}: {sum(right)} right, in {seconds:.1f} s")
    for row, answer in list(zip(asked, said, strict=True))[-3:]:
        print(f"  {row['user']}: {row['prompt']} {answer.strip()}")


def main() -> None:
    """Write data, or serve what was trained on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("write", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("people", type=int, nargs="?", default=50)
    options = parser.parse_args()
    if options.mode == "write":
        write(options.folder, options.people)
    else:
        serve(options.folder)


if __name__ == "__main__":
    main()
