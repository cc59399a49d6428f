"""The linear layers of one block of each measured model, grouped by shared input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Linears that read the same x [M, n]."""

    names: tuple[str, ...]
    n: int
    ms: tuple[int, ...]


MODELS: dict[str, tuple[Group, ...]] = {
    "mistral-7b": (
        Group(("q_proj", "k_proj", "v_proj"), 4096, (4096, 1024, 1024)),
        Group(("o_proj",), 4096, (4096,)),
        Group(("gate_proj", "up_proj"), 4096, (14336, 14336)),
        Group(("down_proj",), 14336, (4096,)),
    ),
    "gemma-2-9b": (
        Group(("q_proj", "k_proj", "v_proj"), 3584, (4096, 2048, 2048)),
        Group(("o_proj",), 4096, (3584,)),
        Group(("gate_proj", "up_proj"), 3584, (14336, 14336)),
        Group(("down_proj",), 14336, (3584,)),
    ),
    "llama-3.2-3b": (
        Group(("q_proj", "k_proj", "v_proj"), 3072, (3072, 1024, 1024)),
        Group(("o_proj",), 3072, (3072,)),
        Group(("gate_proj", "up_proj"), 3072, (8192, 8192)),
        Group(("down_proj",), 8192, (3072,)),
    ),
    "roberta-large": (
        Group(("query", "key", "value"), 1024, (1024, 1024, 1024)),
        Group(("attention.output",), 1024, (1024,)),
        Group(("intermediate",), 1024, (4096,)),
        Group(("output",), 4096, (1024,)),
    ),
}
