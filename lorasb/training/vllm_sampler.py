"""Sampling from vLLM during training: after a step R alone goes to the sampler, which holds W, A and B."""

from __future__ import annotations

import atexit
import http.client
import itertools
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints import shared_factors
from ..compat import vllm as private
from ..compat.torch import uncompiled
from ..constants import CONFIG_NAME, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import adapted_layers, uninitialized
from ..serving.basis import frozen_factors
from ..serving.basis_adapters import save_cores

MEMORY = "/dev/shm"  # a file system in memory, where there is one
TIMEOUT = 600.0  # seconds that the server may take for an answer
START = "start it with LORASB_BASIS=FOLDER VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora"


class Synced(NamedTuple):
    """Result of `sync_to_vllm`."""

    name: str  # the adapter's, which requests name as their model
    request: Any  # the `LoRARequest` that `LLM.generate` takes; None for a server
    bytes: int  # that the sampler read
    seconds: float


class VLLMSampler:
    """A sampler of TRL's `GRPOTrainer` (`rollout_func`): completions from vLLM, by the R's of the step.

        GRPOTrainer(..., rollout_func=lorasb.VLLMSampler("http://127.0.0.1:8000"))

    Args:
        client: address of a vLLM server, or a `vllm.LLM` in this process; LORASB_BASIS named the basis that the
            trained adapter has when it started.
        name: of the adapter in vLLM.
        folder: for the R's, which this process and vLLM can read; in memory by default, on the same machine.
        options: of vLLM's sampling ("top_p", "min_p", ...) besides the trainer's temperature and length.

    Raises:
        ValueError: neither of the two.
    """

    def __init__(
        self, client: Any, *, name: str = "policy", folder: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        if not isinstance(client, str) and not hasattr(client, "llm_engine"):
            raise ValueError(f"expected the address of a vLLM server or a vllm.LLM, got a {type(client).__name__}")
        self.client, self.name, self.options = client, name, options
        self.folder = Path(folder or tempfile.mkdtemp(prefix="lorasb-", dir=MEMORY if Path(MEMORY).is_dir() else None))
        if folder is None:
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.synced: Synced | None = None
        self._step: Any = None  # of the trainer, when R was sent
        self._counter = itertools.count()
        self._digest: tuple[Any, bytes] | None = None  # of A and B, with the first A
        self._former: list[Path] = []

    def sync(self, model: Any, adapter_name: str | None = None) -> Synced:
        """Send R of an adapter of a patched model, the active one by default.

        Raises:
            ValueError: an adapter that is not initialized.
            RuntimeError: vLLM refused it, with its reason: other A and B than the server's, or no plugin.
        """
        started = time.perf_counter()
        plain: Any = uncompiled(model)
        name, layers = adapted_layers(plain, adapter_name)
        fresh = uninitialized(layers, name)
        if fresh:
            raise ValueError(f"adapter {name!r} has not been initialized ({fresh[0]}): call lorasb.initialize first")
        # another path for every R, as vLLM's cache of prefixes goes by name and path
        path = self.folder / f"{self.name}-{next(self._counter)}"
        save_cores(path, layers, name, plain.peft_config[name], self._digest_of(layers, name))
        request = self._load(path)
        self._forget(path)
        size = sum((path / file).stat().st_size for file in (WEIGHTS_NAME, CONFIG_NAME))
        self.synced = Synced(self.name, request, size, time.perf_counter() - started)
        return self.synced

    def _digest_of(self, layers: dict[str, AdaptedLayer], name: str) -> bytes:
        """SHA-256 of A and B, which stay: of a model of gigabytes it takes seconds."""
        first = next(iter(layers.values())).lorasb_A[name]
        if self._digest is None or self._digest[0] is not first:
            self._digest = first, shared_factors.digest(frozen_factors(layers, name))
        return self._digest[1]

    def _load(self, path: Path) -> Any:
        if isinstance(self.client, str):
            body = {"lora_name": self.name, "lora_path": str(path.resolve()), "load_inplace": True}
            _post(self.client, "/v1/load_lora_adapter", body)
            return None
        request = private.lora_request(self.name, str(path.resolve()))
        try:
            loaded = self.client.llm_engine.add_lora(request)
        except Exception as error:  # whatever the engine makes of the plugin's ValueError
            raise RuntimeError(f"vLLM refused the adapter: {error}. {START}") from error
        if not loaded:
            raise RuntimeError(f"vLLM did not load the adapter. {START}")
        return request

    def _forget(self, path: Path) -> None:
        """Remove R's that no step can ask for: vLLM may read the last one again, after it has evicted it."""
        self._former.append(path)
        for old in self._former[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        del self._former[:-2]

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """A completion of every prompt (texts or chats), as TRL's `rollout_func` returns them."""
        if self.synced is None or trainer.state.global_step != self._step:
            self._sync_once(trainer)
            self._step = trainer.state.global_step
        ids = _tokens(prompts, trainer.processing_class)
        sampling = {"temperature": trainer.args.temperature, "max_tokens": trainer.args.max_completion_length}
        found = self.complete(ids, **sampling)
        return {"prompt_ids": ids, "completion_ids": [t for t, _ in found], "logprobs": [p for _, p in found]}

    def _sync_once(self, trainer: Any) -> None:
        """Send R from the first process alone to a server that all have."""
        if not isinstance(self.client, str) or trainer.accelerator.is_main_process:
            self.sync(trainer.accelerator.unwrap_model(trainer.model))
        else:
            self.synced = Synced(self.name, None, 0, 0.0)
        trainer.accelerator.wait_for_everyone()

    def complete(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities of a completion of each prompt, by the R's that were sent last.

        Args:
            prompts: tokens.
            sampling: vLLM's sampling parameters, "temperature", "max_tokens", ...
        """
        if self.synced is None:
            raise ValueError("no R has been sent: call sampler.sync(model) first")
        sampling = self.options | sampling
        if not isinstance(self.client, str):
            return private.complete(self.client, prompts, sampling, self.synced.request)
        body = {"model": self.name, "prompt": [list(one) for one in prompts], "logprobs": 1, "return_token_ids": True}
        choices = _post(self.client, "/v1/completions", body | sampling)["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def sync_to_vllm(model: Any, client: Any, *, adapter_name: str | None = None, **options: Any) -> Synced:
    """Send R of a patched model's adapter to vLLM; W, A and B, which it has, are not sent.

    Args:
        model: a patched model, whose adapter has the A and B of the basis that vLLM was started with.
        client: a `VLLMSampler`, which is faster from the second call on, or what it takes: a server's address or an
            `LLM`.
        adapter_name: the active adapter by default.
        options: `name` and `folder` of `VLLMSampler`.

    Returns:
        The adapter's name for requests, the `LoRARequest` of an `LLM`, bytes and seconds.

    Raises:
        ValueError: an adapter that is not initialized, or a client of neither kind.
        RuntimeError: vLLM refused it, with its reason.
    """
    sampler = client if isinstance(client, VLLMSampler) else VLLMSampler(client, **options)
    return sampler.sync(model, adapter_name)


@torch.no_grad()
def _tokens(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    """Tokens of texts, or of chats that an answer follows."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(prompts[0], str):
        found: list[list[int]] = tokenizer(list(prompts))["input_ids"]
        return found
    chats = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(one) for one in chats["input_ids"]]


def _post(address: str, path: str, body: dict[str, Any]) -> Any:
    """The JSON that a server answers with, or its text."""
    request = urllib.request.Request(
        address.rstrip("/") + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        raise RuntimeError(f"vLLM at {address} answered {error.code}: {_message(reason)}. {START}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise RuntimeError(f"no vLLM answers at {address} ({error}): {START}") from None
    return json.loads(text) if text.startswith("{") else text


def _message(text: str) -> str:
    """The message of an error in the server's form."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text
