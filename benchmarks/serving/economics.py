"""Bytes of many adapters, the shared basis included, against LoRAs: from the shapes of a model's layers alone.

    python -m benchmarks.serving.economics

Everything is in fp32, as adapters are saved; bf16 halves all of it. On a basis of rank r, N adapters take A and B once
and N times R: Σ r·(in + out) + N·Σ r². N LoRAs of rank r take N·Σ r·(in + out).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import MODELS, Group
from lorasb.utils.plotting import GRAD, INK, MUTED, SIGN

FP32 = 4  # bytes
COUNTS = (1, 3, 10, 100, 1000, 10000)
LORA_RANKS, RANKS = (1, 8, 32), (16, 64)
SMOLLM2 = (
    Group(("q_proj", "k_proj", "v_proj"), 576, (576, 192, 192)),
    Group(("o_proj",), 576, (576,)),
    Group(("gate_proj", "up_proj"), 576, (1536, 1536)),
    Group(("down_proj",), 1536, (576,)),
)
BLOCKS: dict[str, tuple[tuple[Group, ...], int]] = {  # a block's layers, and the number of blocks
    "SmolLM2-135M": (SMOLLM2, 30),
    "Mistral-7B": (MODELS["mistral-7b"], 32),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model's adapters in fp32."""

    model: str

    def _layers(self) -> Iterator[tuple[int, int]]:
        """(in_features, out_features) of every linear layer."""
        groups, blocks = BLOCKS[self.model]
        return ((group.n, m) for _ in range(blocks) for group in groups for m in group.ms)

    def lora(self, r: int) -> int:
        """Bytes of a LoRA, or of A and B of a basis of its rank."""
        return FP32 * r * sum(n + m for n, m in self._layers())

    def core(self, r: int) -> int:
        """Bytes of the R of all layers."""
        return FP32 * r * r * sum(1 for _ in self._layers())

    def on_basis(self, r: int, count: int) -> int:
        """Bytes of adapters on one basis, the basis included."""
        return self.lora(r) + count * self.core(r)

    def crossover(self, r: int, lora_r: int) -> int | None:
        """The number of adapters from which a basis of rank r takes less than LoRAs; None if it never does."""
        saved = self.lora(lora_r) - self.core(r)
        return self.lora(r) // saved + 1 if saved > 0 else None


def table(model: str) -> Table:
    """Megabytes by number of adapters."""
    sizes, view = Sizes(model), Table(title=f"{model}: megabytes in fp32, basis included")
    view.add_column("adapters", justify="right")
    for name in (*(f"LoRA r={r}" for r in LORA_RANKS), *(f"basis r={r}, R each" for r in RANKS)):
        view.add_column(name, justify="right")
    for count in COUNTS:
        loras = [count * sizes.lora(r) for r in LORA_RANKS]
        view.add_row(
            f"{count:,}", *(f"{size / 1e6:,.1f}" for size in (*loras, *(sizes.on_basis(r, count) for r in RANKS)))
        )
    view.add_section()
    view.add_row(
        "one more", *(f"{size / 1e6:,.2f}" for size in (*map(sizes.lora, LORA_RANKS), *map(sizes.core, RANKS)))
    )
    return view


def crossovers(model: str) -> Iterator[str]:
    """Yield for each basis the number of adapters from which it takes less memory than LoRAs."""
    for r in RANKS:
        found = {lora_r: Sizes(model).crossover(r, lora_r) for lora_r in LORA_RANKS}
        parts = (f"LoRA r={a}: {'never' if n is None else f'from {n} on'}" for a, n in found.items())
        yield f"{model}, a basis of rank {r} takes less than " + ", ".join(parts)


def draw_totals(axes: Any, model: str) -> None:
    """Draw megabytes over the number of adapters, and mark where a basis begins to take less than LoRAs."""
    sizes, counts = Sizes(model), [round(1.25**i) for i in range(42)]  # to 10,000
    for r, style in zip(LORA_RANKS, (":", "--", "-"), strict=True):
        axes.loglog(counts, [n * sizes.lora(r) / 1e6 for n in counts], style, color=MUTED, label=f"LoRA r={r}")
    for r, color in zip(RANKS, (SIGN, GRAD), strict=True):
        axes.loglog(counts, [sizes.on_basis(r, n) / 1e6 for n in counts], color=color, label=f"basis r={r}, R each")
        for lora_r in LORA_RANKS:
            at = sizes.crossover(r, lora_r)
            if at is not None and at <= counts[-1]:
                axes.plot(at, sizes.on_basis(r, at) / 1e6, "o", color=color, markersize=4)
    axes.set_xlabel("adapters")
    axes.set_ylabel("MB, basis included")
    axes.set_title(f"{model}, fp32", fontsize=10, color=INK)


def main() -> None:
    """Print the tables."""
    console = Console(width=120)
    for model in BLOCKS:
        console.print(table(model))
        for line in crossovers(model):
            console.print(line)


if __name__ == "__main__":
    main()
