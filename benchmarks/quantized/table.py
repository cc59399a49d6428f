"""The report's table of 4-bit bases, from the committed results; docs/quantized.md quotes its last lines."""

from __future__ import annotations

from typing import Any

BLOCK, STEP = ("block", "Mistral-7B, 512 tokens, f+b"), ("step", "SmolLM2, 4 x 128 tokens")
DENSE, DENSE_BEFORE = "PEFT, dense, r=32", "PEFT on bf16, r=32"  # DENSE's name in older results
QLORA, BARE, OURS = "Linear4bit + LoRA r=32", "dense, bare", "ours, r=96"

# row, case, baseline, ours, label in the table
LINES = (
    (
        "dequantize",
        "4 of 4096 x 4096",
        "bitsandbytes",
        "ours",
        "dequantize four weights 4096 x 4096 to {dtype}; bitsandbytes",
    ),
    ("dequantize", "4 of 4096 x 4096", "bytes in and out", "ours", "limit: those bytes read and written by torch"),
    ("dequantize", "4 of 2048 x 2048", "bitsandbytes", "ours", "four 2048 x 2048; bitsandbytes"),
    ("train", "1 tokens, f+b", QLORA, OURS, "training, 1 token, f+b; `Linear4bit` + LoRA r=32"),
    ("train", "1 tokens, f+b", BARE, OURS, "the dense bare layer"),
    ("train", "16 tokens, f+b", QLORA, OURS, "16 tokens; `Linear4bit` + LoRA r=32"),
    ("train", "16 tokens, f+b", BARE, OURS, "the dense bare layer"),
    ("train", "512 tokens, f+b", QLORA, OURS, "512 tokens; `Linear4bit` + LoRA r=32"),
    ("train", "512 tokens, f+b", BARE, OURS, "limit: the dense bare layer"),
    ("evaluate", "1 tokens", "Linear4bit", "ours", "evaluation, 1 token, no adapter; `Linear4bit`"),
    ("evaluate", "1 tokens", "bytes in", "ours", "limit: the packed bytes read by torch"),
    ("evaluate", "1 tokens", QLORA, OURS, "with adapters, r=32 and r=96"),
    *(
        ("evaluate", f"{M} tokens", "Linear4bit", "ours", f"{M} tokens, no adapter")
        for M in (2, 4, 8, 16, 32, 64, 128, 512)
    ),
    ("evaluate", "512 tokens", "dense", "ours", "limit: the dense product"),
    ("evaluate", "512 tokens", QLORA, OURS, "with adapters, r=32 and r=96"),
    (*BLOCK, "PEFT QLoRA r=32", "ours on 4 bits, r=96", "a Mistral-7B block, 512 tokens, f+b; PEFT QLoRA r=32"),
    (*BLOCK, DENSE, "ours on 4 bits, r=96", "PEFT on {dtype}, r=32"),
    (*STEP, "PEFT QLoRA r=32", "ours", "a step of SmolLM2-135M, 4 x 128 tokens; PEFT QLoRA r=32"),
    ("decode", "48 tokens", "bitsandbytes + PEFT", "ours", "decoding 48 tokens, SmolLM2; bitsandbytes + PEFT"),
)


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown: medians in milliseconds, and the ratio of ours to theirs in the same run."""
    rows = {(one["row"], one["case"]): one for one in found["rows"]}
    machine = found["machine"]
    dtype = machine.get("dtype", "bf16")  # missing in older results
    head = f" {machine['class']}, {dtype}" if "class" in machine else ""
    lines = [f"|{head} | against | ours | ratio |", "|---|---:|---:|---:|"]
    for name, case, against, ours, label in LINES:
        ways = rows[name, case]["ways"]
        theirs, own = ways[DENSE_BEFORE if against == DENSE and DENSE not in ways else against], ways[ours]
        said = label.format(dtype=dtype)
        indented = said if ";" in said else f"&nbsp;&nbsp;&nbsp;{said}"
        share = own["ratio"] / theirs["ratio"]  # both are medians of ratios to the first way
        lines.append(f"| {indented} | {theirs['p50']:.4g} ms | {own['p50']:.4g} ms | {share:.2f}x |")
    memory = rows[STEP]["new_bytes"]
    theirs, own = (memory[way] / 1e6 for way in ("PEFT QLoRA r=32", "ours"))
    lines.append(f"| the step's memory beyond the model | {theirs:.0f} MB | {own:.0f} MB | {own / theirs:.2f}x |")
    shares = ", ".join(f"{one['share']:.3f}" for one in found["rows"] if one["row"] == "memory")
    lines.append(f"| weights in memory over bf16, plain and nested statistics | | {shares} | |")
    return lines
