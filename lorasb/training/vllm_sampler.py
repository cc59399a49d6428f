"""Sampling from vLLM during training: after each step only R is sent to the sampler, which holds W, A and B."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import itertools
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from ..compat import vllm as private
from ..compat.torch import unwrapped
from ..constants import CONFIG_NAME, WEIGHTS_NAME
from ..init.accumulator import version_of
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import digests, frozen_factors, layers_of_one, refuse_more_than_factors
from ..serving.basis import save_cores

MEMORY = "/dev/shm"  # a file system in memory, where there is one
TIMEOUT = 600.0  # seconds to wait for the server's answer
START = "LORASB_BASIS=FOLDER VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora starts one"
# neutral sampling parameters; a server takes missing ones from the model's generation_config.json
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
OF_TRAINER = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # attributes of a GRPOTrainer


class Synced(NamedTuple):
    """Result of `sync_to_vllm`."""

    name: str  # the adapter's, which requests pass as their model
    request: object  # the `LoRARequest` that `LLM.generate` takes; None for a server
    bytes: int  # read by the sampler
    seconds: float


class VLLMSampler:
    """A sampler for TRL's `GRPOTrainer` (`rollout_func`): completions from vLLM with the current step's R's.

        GRPOTrainer(..., rollout_func=lorasb.VLLMSampler("http://127.0.0.1:8000"))

    Args:
        client: address of a vLLM server, or a `vllm.LLM` in this process, both started with LORASB_BASIS set to the
            basis of the trained adapter.
        name: the adapter's name in vLLM; a new one by default, so that runs may share a server.
        folder: where R's are written, for both this process and vLLM; in memory by default, on the same machine.
        api_key: the server's.
        options: vLLM sampling parameters ("frequency_penalty", ...) in addition to the trainer's.

    Raises:
        ValueError: `client` is neither.
    """

    def __init__(
        self,
        client: Any,
        *,
        name: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        **options: object,
    ) -> None:
        if not isinstance(client, str) and not hasattr(client, "llm_engine"):
            raise ValueError(f"expected the address of a vLLM server or a vllm.LLM, got a {type(client).__name__}")
        self.client, self.api_key, self.options = client, api_key, options
        self.name = name or f"policy-{uuid.uuid4().hex[:8]}"
        place = folder or (MEMORY if Path(MEMORY).is_dir() else None)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        # a new folder for every run: vLLM's prefix cache is keyed by an adapter's name and path
        self.folder = Path(tempfile.mkdtemp(prefix="lorasb-", dir=place)).resolve()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.synced: Synced | None = None
        self._sent: tuple[object, ...] | None = None  # a weak reference to the trainer's model, step, version of R
        self._counter = itertools.count()
        self._digest: tuple[Tensor, int, bytes] | None = None  # the first A, version and digest of A and B

    def sync(self, model: PeftModel, adapter_name: str | None = None) -> Synced:
        """Send the R of a patched model's adapter, the active one by default.

        Raises:
            ValueError: several adapters are active, or the adapter is not initialized, has more than R, has a sharded
                R, or has a different scale than it was made with.
            RuntimeError: vLLM refused it, with its reason: A and B differ from the server's, or there is no plugin.
        """
        started = time.perf_counter()
        model = unwrapped(model)
        name, layers = _to_send(model, adapter_name)
        first = next(iter(layers.values())).lorasb_A[name]
        version = sum(map(version_of, frozen_factors(layers, name).values()))  # grows if any is written
        if self._digest is None or self._digest[0] is not first or self._digest[1] != version:
            self._digest = first, version, digests(layers, name)[-1]  # takes seconds for gigabytes
        number = next(self._counter)
        path = self.folder / f"{self.name}-{number}"
        try:
            save_cores(path, layers, name, model.peft_config[name], self._digest[2])
            request = self._load(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        # Remove R's that no step needs anymore; the latest ones stay, as vLLM may evict one and read it again.
        shutil.rmtree(self.folder / f"{self.name}-{number - 2}", ignore_errors=True)
        size = sum((path / file).stat().st_size for file in (WEIGHTS_NAME, CONFIG_NAME))
        self.synced = Synced(self.name, request, size, time.perf_counter() - started)
        return self.synced

    def _load(self, path: Path) -> object:
        """Have vLLM load R's from a folder; return the `LoRARequest` for an `LLM`."""
        if isinstance(self.client, str):
            self._post("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(path), "load_inplace": True})
            return None
        request = private.lora_request(self.name, str(path))
        try:
            loaded = self.client.llm_engine.add_lora(request)
        except Exception as error:  # the engine may turn the plugin's ValueError into any other
            raise RuntimeError(f"vLLM refused the adapter: {error}") from error
        if not loaded:
            raise RuntimeError("vLLM did not load the adapter: set LORASB_BASIS before the LLM is made")
        return request

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[list[int]] | list[list[float]]]:
        """Return a completion of every prompt (texts or chats), in the format of TRL's `rollout_func`."""
        model = unwrapped(trainer.accelerator.unwrap_model(trainer.model))
        name, layers = _to_send(model, None)  # on all processes: if only one failed, the others would wait for it
        version = sum(version_of(layer.lorasb_R[name]) for layer in layers.values())
        now = weakref.ref(trainer.model), trainer.state.global_step, version
        if self.synced is None or self._sent != now:
            if not isinstance(self.client, str) or trainer.accelerator.is_main_process:
                self.sync(model)
            else:  # only the first process sends R to a server that all share
                self.synced = Synced(self.name, None, 0, 0.0)
            trainer.accelerator.wait_for_everyone()
            self._sent = now
        ids = _tokens(prompts, trainer)
        sampling = {key: getattr(trainer, key) for key in OF_TRAINER if getattr(trainer, key, None) is not None}
        found = self.complete(ids, max_tokens=trainer.args.max_completion_length, **sampling)
        return {"prompt_ids": ids, "completion_ids": [t for t, _ in found], "logprobs": [p for _, p in found]}

    def complete(self, prompts: Sequence[Sequence[int]], **sampling: object) -> list[tuple[list[int], list[float]]]:
        """Return tokens and log-probabilities of one completion per prompt, with the R's that were sent last.

        Args:
            prompts: tokens.
            sampling: vLLM's sampling parameters, "temperature", "max_tokens", ...; missing ones are neutral.
        """
        if self.synced is None:
            raise ValueError("no R has been sent: call sampler.sync(model) first")
        sampling = NEUTRAL | self.options | sampling
        if not isinstance(self.client, str):
            return private.complete(self.client, prompts, sampling, self.synced.request)
        body = {"model": self.name, "prompt": [list(one) for one in prompts], "logprobs": 1, "return_token_ids": True}
        choices = sorted(self._post("/v1/completions", body | sampling)["choices"], key=lambda one: one["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def _post(self, path: str, body: dict[str, object]) -> Any:
        """Return the server's JSON answer, or its text."""
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.client.rstrip("/") + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            raise RuntimeError(_refusal(self.client, error, self.folder)) from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise RuntimeError(f"no vLLM answers at {self.client} ({error}): {START}") from None
        return json.loads(text) if text.startswith("{") else text


def sync_to_vllm(model: PeftModel, client: str | VLLMSampler, *, adapter_name: str | None = None) -> Synced:
    """Send the R of a patched model's adapter to vLLM, which already has W, A and B.

    Args:
        model: a patched model, whose adapter has the A and B of the basis that vLLM was started with.
        client: a server's address, or a `VLLMSampler`, which has more options and also takes an `LLM`.
        adapter_name: the active adapter by default.

    Returns:
        The adapter's name for requests, the `LoRARequest` of an `LLM`, bytes and seconds.

    Raises:
        ValueError: a client of neither kind, or an adapter that `VLLMSampler.sync` refuses.
        RuntimeError: vLLM refused it, with its reason.
    """
    if not isinstance(client, str | VLLMSampler):
        raise ValueError(f"expected a vLLM server's address or a lorasb.VLLMSampler, got a {type(client).__name__}")
    return (_sampler(client) if isinstance(client, str) else client).sync(model, adapter_name)


_sampler = functools.cache(VLLMSampler)  # one per address, which hashes A and B once, and removes old R's


def _to_send(model: PeftModel, adapter_name: str | None) -> tuple[str, dict[str, AdaptedLayer]]:
    """Return an adapter's name and layers; raise a ValueError if vLLM could not compute as the model from R alone."""
    name, layers = layers_of_one(model, adapter_name)
    refuse_more_than_factors(model, name, "it is not sent, so serve a merged model or export_lora")
    if any(layer.adapters[name].scaling != layer.adapters[name].made_with for layer in layers.values()):
        raise ValueError(f"adapter {name!r} has another scale than it was made with: set_scale({name!r}, 1.0)")
    return name, layers


def _tokens(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Tokenize texts, or chats up to the next answer, as the trainer renders them."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    if not all(isinstance(message["content"], str) for chat in prompts for message in chat):
        raise ValueError("expected messages of text, got other content: images are not sent to the sampler")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "tools": trainer.tools or None}
    chats = tokenizer.apply_chat_template(
        list(prompts), chat_template=trainer.chat_template, **options, **trainer.chat_template_kwargs
    )
    return [list(one) for one in chats["input_ids"]]


def _refusal(address: str, error: urllib.error.HTTPError, folder: Path) -> str:
    """Return a server error's message, with the fix if it is known."""
    text = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    said = f"vLLM at {address} answered {error.code}: {text}"
    if "No adapter found" in text:
        return f"{said}. The server does not see {folder}: pass a folder= that it can read"
    return f"{said}. {START}" if error.code == 404 and "load_lora_adapter" in (error.url or "") else said
