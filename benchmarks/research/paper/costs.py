"""Table 8: what an adapter costs at inference, on four real architectures without their weights.

Multiply-accumulates of every linear layer (the output embedding included, attention scores left out, as the paper's
figures do) for 256 tokens: in·out for W, r·(in + out) for LoRA and r·(in + out) + r² for LoRA-SB. FLOPs are twice that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.csv_files import write_csv
from benchmarks.common.tables import show

TOKENS = 256
ALL_LINEAR = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# The paper's differences between ranks match four modules per block, including RoBERTa's wide `output.dense`.
ROBERTA = r".*(query|value|output\.dense)"


@dataclass(frozen=True)
class Published:
    """A line of Table 8: MACs and FLOPs in units of `unit`, with so many digits after the point."""

    method: str
    r: int
    macs: float
    flops: float


@dataclass(frozen=True)
class Model:
    """An architecture and what the paper says of it."""

    name: str
    build: Callable[[], nn.Module]
    targets: str
    unit: float
    lines: tuple[Published, ...]
    note: str = ""


def _causal(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def roberta_large() -> nn.Module:
    """24 blocks of 1024, without a head."""
    from transformers import RobertaConfig, RobertaModel

    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    return RobertaModel(RobertaConfig(**sizes, vocab_size=50265), add_pooling_layer=False)


def llama_3b() -> nn.Module:
    """Llama-3.2 3B."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    }
    return _causal(LlamaConfig(**sizes, intermediate_size=8192, vocab_size=128256, head_dim=128))


def mistral_7b() -> nn.Module:
    """Mistral 7B: the configuration's defaults."""
    from transformers import MistralConfig

    return _causal(MistralConfig())


def gemma_9b(intermediate: int = 14336) -> nn.Module:
    """Gemma-2 9B."""
    from transformers import Gemma2Config

    sizes: dict[str, Any] = {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    return _causal(Gemma2Config(**sizes, head_dim=256, intermediate_size=intermediate, vocab_size=256000))


GIGA, TERA = 1e9, 1e12
WITHOUT_R = (
    "r = 24 is 78.97 G without the products with R; the published FLOPs are 0.04 to 0.06 G more than twice the MACs, "
    "about what the additions of the biases are (0.057 G)"
)
TWICE_AS_WIDE = (
    "the paper's would be 15.1e9 weights, the model has 9.2e9. Its steps between ranks are those of an MLP twice as "
    "wide (28672), which is what Google's own configuration counts for gate and up together"
)
MODELS = (
    Model(
        "RoBERTa-large",
        roberta_large,
        ROBERTA,
        GIGA,
        (
            Published("LoRA", 8, 77.86, 155.79),
            Published("LoRA-SB", 16, 78.42, 156.91),
            Published("LoRA-SB", 24, 78.97, 158.01),
        ),
        WITHOUT_R,
    ),
    Model(
        "Llama-3.2 3B",
        llama_3b,
        ALL_LINEAR,
        TERA,
        (
            Published("LoRA", 32, 0.84, 1.67),
            Published("LoRA-SB", 64, 0.85, 1.70),
            Published("LoRA-SB", 96, 0.86, 1.72),
        ),
    ),
    Model(
        "Mistral 7B",
        mistral_7b,
        ALL_LINEAR,
        TERA,
        (
            Published("LoRA", 32, 1.84, 3.69),
            Published("LoRA-SB", 64, 1.86, 3.73),
            Published("LoRA-SB", 92, 1.88, 3.77),
        ),
    ),
    Model(
        "Gemma-2 9B",
        gemma_9b,
        ALL_LINEAR,
        TERA,
        (
            Published("LoRA", 32, 3.89, 7.77),
            Published("LoRA-SB", 64, 3.93, 7.86),
            Published("LoRA-SB", 96, 3.97, 7.94),
        ),
        TWICE_AS_WIDE,
    ),
)


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer."""
    return {
        name: (int(module.in_features), int(module.out_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def count(layers: dict[str, tuple[int, int]], targets: str, method: str, r: int) -> tuple[int, int]:
    """Trained parameters, and multiply-accumulates for `TOKENS` tokens."""
    adapted = [size for name, size in layers.items() if re.fullmatch(targets, name)]
    thin = sum(r * (n + m) for n, m in adapted)
    cores = len(adapted) * r * r if method == "LoRA-SB" else 0
    base = sum(n * m for n, m in layers.values())
    return cores or thin, (base + thin + cores) * TOKENS


def rows() -> list[dict[str, Any]]:
    """Every line of the table, ours next to the paper's."""
    found = []
    for model in MODELS:
        with torch.device("meta"):
            layers = linears(model.build())
        found += [_row(model, layers, line) for line in model.lines]
    return found


def _row(model: Model, layers: dict[str, tuple[int, int]], line: Published) -> dict[str, Any]:
    trained, macs = count(layers, model.targets, line.method, line.r)
    ours, theirs = macs / model.unit, line.macs
    return {
        "model": model.name,
        "method": line.method,
        "r": line.r,
        "trained": trained,
        "macs": macs,
        "flops": 2 * macs,
        "paper_macs": line.macs * model.unit,
        "paper_flops": line.flops * model.unit,
        "ratio": round(ours / theirs, 4),
        "within_a_digit": abs(ours - theirs) <= 0.0101,
        "note": model.note,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    unit, letter = (GIGA, "G") if row["macs"] < TERA / 2 else (TERA, "T")
    ours, theirs, flops, their_flops = (
        f"{row[name] / unit:.2f} {letter}" for name in ("macs", "paper_macs", "flops", "paper_flops")
    )
    mark = "" if row["within_a_digit"] else " *"
    return [
        row["model"],
        row["method"],
        str(row["r"]),
        f"{row['trained']:,}",
        ours,
        theirs + mark,
        f"{row['ratio']:.3f}",
        flops,
        their_flops,
    ]


def main(output: Path, folder: Path | None = None) -> None:
    """Count, print and write; no data is needed."""
    found = rows()
    title = f"inference of {TOKENS} tokens: multiply-accumulates of all linear layers (Table 8)"
    head = ("model", "method", "r", "trained", "MACs", "paper's", "ratio", "FLOPs", "paper's")
    show(title, head, map(_cells, found), left=2)
    notes = {row["model"]: row["note"] for row in found if row["note"] and not row["within_a_digit"]}
    for name, note in notes.items():
        print(f"* {name}: {note}")
    write_csv(output / "costs.csv", found)
