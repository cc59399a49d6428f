"""Adapters of a few people on one basis of SmolLM2, saved, and the tokens that transformers chooses with each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import generated
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis import add_adapters, save_adapters

PROMPTS = ("My favorite color and pet are:", "Once upon a time there was", "The capital of France is")
PEOPLE = [f"user{i}" for i in range(32)]
NEW = 16  # tokens of an answer
SIZE = 0.04  # ‖R‖ over ‖W‖ of a layer: answers differ from the base's, and are still language
# Two tokens whose logits in transformers are this close may swap if fp32 sums are taken in another order
# (2^-24 of logits near 20, through thirty blocks).
NEAR = 1e-3


class Answer:
    """Greedy tokens, and how many of them are certain, given each one's lead over the second best."""

    def __init__(self, tokens: Sequence[int], leads: Sequence[float]) -> None:
        near = next((i for i, lead in enumerate(leads) if lead < NEAR), len(leads))
        self.tokens = list(tokens)
        self.certain = near  # number of tokens before the first uncertain one

    def agrees(self, tokens: Sequence[int]) -> bool:
        """True if another engine's tokens are the same as far as these are certain."""
        return len(tokens) == len(self.tokens) and list(tokens)[: self.certain] == self.tokens[: self.certain]


def make_people(folder: Path) -> Any:
    """A model with a basis "default" and adapters on it, saved as `folder` and `folder`/NAME."""
    torch.manual_seed(0)
    source = lorasb.demo_model()
    model = lorasb.patch(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    ids = AutoTokenizer.from_pretrained(source)("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    lorasb.initialize(model, [{**ids, "labels": ids["input_ids"]}], lr=1e-3, progress=False)
    add_adapters(model, PEOPLE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers_with(model, "default").values():
            size = SIZE * layer.base.parameter().norm() / layer.r["default"]
            for name in PEOPLE:
                core = layer.lorasb_R[name]
                core.copy_(torch.randn(core.shape, generator=generator) * size)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    save_adapters(model, folder, PEOPLE)
    return model.eval()


def answers(model: Any, prompt: list[int], rows: Sequence[str] | None) -> list[Answer]:
    """transformers' greedy answers to a prompt, one per row with its adapter; `rows` is None for a plain model."""
    ids = torch.tensor([prompt] * (1 if rows is None else len(rows)))
    options: dict[str, Any] = {} if rows is None else {"adapter_names": list(rows)}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    out: Any = generated(model, ids, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    best = torch.stack([scores.topk(2).values for scores in out.scores], dim=1)
    tokens, leads = out.sequences[:, len(prompt) :], best[..., 0] - best[..., 1]
    return [Answer(row.tolist(), lead.tolist()) for row, lead in zip(tokens, leads, strict=True)]


class People:
    """Folders of adapters, and what transformers answers with each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, make_people(folder)
        tokenizer = AutoTokenizer.from_pretrained(lorasb.demo_model())
        self.prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        rows = [*PEOPLE, "__base__"]
        found = [answers(self.model, prompt, rows) for prompt in self.prompts[:2]]
        self.answers = {name: [of_prompt[i] for of_prompt in found] for i, name in enumerate(rows)}

    def of(self, name: str) -> Path:
        """The adapter's folder; adapters from user32 on reuse the R's of the first 32."""
        path = self.folder / name
        if not path.exists():
            path.symlink_to(self.folder / self._owner(name))
        return path

    def _owner(self, name: str) -> str:
        return name if name == "__base__" else f"user{int(name.removeprefix('user')) % len(PEOPLE)}"

    def answer(self, name: str, prompt: int = 0) -> Answer:
        """What transformers answers with the adapter's R's."""
        return self.answers[self._owner(name)][prompt]
