"""Steps of decoding: one token of every row, after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

ROWS, PROMPT = 64, 16


class Steps:
    """Decoding steps of one token per row; after each, the cache is cropped back to the prompt.

    Adapter names are set once around sixteen steps, as in a generation of sixteen tokens.

    Args:
        model: a PeftModel, or one without adapters.
        names: an adapter for each row; None for the active one.
        rows: number of rows in the batch.
    """

    COUNT = 16

    def __init__(self, model: Any, names: Sequence[str] | None = None, rows: int = ROWS) -> None:
        self.model, self.names, self.cache = model, names, DynamicCache()
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        g = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(5, 1000, (rows, PROMPT), generator=g)
        self.token = torch.randint(5, 1000, (rows, 1), generator=g)
        with self._named():
            self._forward(self.prompt)

    def _named(self) -> AbstractContextManager[Any]:
        if self.names is None:
            return nullcontext()
        hooks: AbstractContextManager[Any] = self.model.base_model._enable_peft_forward_hooks(
            adapter_names=list(self.names)
        )
        return hooks

    def _forward(self, ids: torch.Tensor) -> None:
        with torch.inference_mode():
            self.inner(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def __call__(self, _: int) -> None:
        with self._named():
            for _ in range(self.COUNT):
                self._forward(self.token)
                self.cache.crop(-1)
