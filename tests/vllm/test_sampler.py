"""Sending R to a sampler: files and requests with a mock server; test_server.py covers vLLM itself."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from basis_models import a_layer, base, fill, with_basis
from peft import PeftModel
from safetensors.torch import load_file
from tolerances import EXACT, check

import lorasb
from lorasb.checkpoints.shared_factors import DIGEST, digest
from lorasb.constants import WEIGHTS_NAME
from lorasb.layers.lookup import frozen_factors, layers_with
from lorasb.vllm import plugin


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        server.headers.append(dict(self.headers))
        loaded = self.path.endswith("adapter") and server.status == 200
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(("Success" if loaded else json.dumps(server.answer)).encode())

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers as vLLM would, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.status, self.answer = 200, {"choices": []}  # type: ignore[var-annotated]
        self.address = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def model() -> Any:
    one = with_basis()
    fill(one, "default", 1)
    return one


def grpo(**options: Any) -> Any:
    """A stand-in for TRL's trainer, with the parts that the sampler reads."""
    process = SimpleNamespace(unwrap_model=lambda one: one, is_main_process=True, wait_for_everyone=lambda: None)
    return SimpleNamespace(
        model=model(),
        state=SimpleNamespace(global_step=1),
        accelerator=process,
        processing_class=lambda texts: {"input_ids": [[len(text)] for text in texts]},
        args=SimpleNamespace(max_completion_length=5),
        min_p=None,
        tools=[],
        chat_template=None,
        chat_template_kwargs={"enable_thinking": False},
        **options,
    )


def test_r_alone_is_sent_and_is_an_adapter_that_the_plugin_reads(server: Server, tmp_path: Path) -> None:
    trained, sampler = model(), lorasb.VLLMSampler(server.address, folder=tmp_path / "new")
    trained.save_pretrained(str(tmp_path / "basis"))
    for step in range(4):
        fill(trained, "default", step)
        sent = lorasb.sync_to_vllm(trained, sampler)
        path, body = server.asked[-1]
        assert (path, body["lora_name"], body["load_inplace"]) == ("/v1/load_lora_adapter", sent.name, True)
        found = plugin._cores(Path(body["lora_path"]), plugin.read_basis(tmp_path / "basis"), torch.float32)
        for name, layer in layers_with(trained, "default").items():
            check(found[name], layer.lorasb_R["default"].detach(), EXACT)
        r = sum(core.numel() for core in found.values())
        assert 4 * r < sent.bytes < 4 * r + 10_000
        assert all(".lorasb_R" in key or "digest" in key for key in load_file(f"{body['lora_path']}/{WEIGHTS_NAME}"))
    # every R gets a new path, and all but the last two are deleted
    paths = [Path(body["lora_path"]) for _, body in server.asked]
    assert len(set(paths)) == 4
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_without_a_folder_nothing_stays_in_the_working_one_and_a_key_is_sent(server: Server) -> None:
    sent = lorasb.VLLMSampler(server.address, api_key="secret").sync(model())
    assert sent.request is None
    assert not Path(server.asked[0][1]["lora_path"]).is_relative_to(Path.cwd())
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_completions_are_in_the_prompts_order(server: Server, tmp_path: Path) -> None:
    sampler = lorasb.VLLMSampler(server.address, folder=tmp_path, frequency_penalty=0.5)
    with pytest.raises(ValueError, match=r"call sampler.sync\(model\) first"):
        sampler.complete([[1]])
    sampler.sync(model())
    choices = [{"index": i, "token_ids": [i], "logprobs": {"token_logprobs": [-0.5 * i]}} for i in (2, 0, 1)]
    server.answer = {"choices": choices}
    trainer = grpo(temperature=0.7, top_k=5)
    found = sampler(["a", "bb", "ccc"], trainer)
    assert found["completion_ids"] == [[0], [1], [2]]
    assert found["logprobs"] == [[-0.0], [-0.5], [-1.0]]
    asked = server.asked[-1][1]
    assert (asked["prompt"], asked["max_tokens"]) == ([[1], [2], [3]], 5)
    # settings of the trainer and of the sampler, and none from the model's generation_config.json
    assert (asked["temperature"], asked["top_k"], asked["frequency_penalty"]) == (0.7, 5, 0.5)
    assert (asked["top_p"], asked["min_p"], asked["repetition_penalty"]) == (1.0, 0.0, 1.0)
    before = len(server.asked)
    sampler(["a"], trainer)  # the same step: nothing to send
    assert len(server.asked) == before + 1
    trainer.model = model()  # another trainer's, at the same step
    sampler(["a"], trainer)
    assert [path for path, _ in server.asked[before + 1 :]] == ["/v1/load_lora_adapter", "/v1/completions"]
    before += 2
    other = lorasb.VLLMSampler(server.address, folder=tmp_path)  # as in another process, after the main one has sent R
    trainer.accelerator.is_main_process = False
    other(["a"], trainer)
    assert [path for path, _ in server.asked[before + 1 :]] == ["/v1/completions"]


def test_what_the_server_refuses_is_one_line(server: Server) -> None:
    unlike, missing = ({"error": {"message": text}} for text in ("other A and B", "No adapter found for policy"))
    for status, answer, message in (
        (500, unlike, "answered 500: other A and B$"),
        (404, missing, "answered 404: No adapter found.* does not see .*pass a folder= that it can read"),
        (404, {"detail": "Not Found"}, "answered 404: .*Not Found.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve"),
    ):
        server.status, server.answer = status, answer
        with pytest.raises(RuntimeError, match=message):
            lorasb.sync_to_vllm(model(), server.address)
    server.server_close()
    server.shutdown()
    with pytest.raises(RuntimeError, match=r"no vLLM answers at http://127.*: LORASB_BASIS=FOLDER"):
        lorasb.sync_to_vllm(model(), server.address)


def test_what_is_sent_is_of_the_factors_and_cores_of_now(server: Server, tmp_path: Path) -> None:
    """A new initialization overwrites A and B in place, and a second training run begins at the same step."""
    server.answer = {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}]}
    trainer, sampler = grpo(temperature=1.0), lorasb.VLLMSampler(server.address, folder=tmp_path)
    layer = a_layer(trainer.model)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            layer.lorasb_A["default"].mul_(factor)
        sampler.sync(trainer.model)
        (path,) = [body["lora_path"] for path, body in server.asked[-1:]]
        sent = load_file(f"{path}/{WEIGHTS_NAME}")
        layers = layers_with(trainer.model, "default")
        assert bytes(sent[DIGEST].tolist()) == digest(frozen_factors(layers, "default"))
    sampler(["a"], trainer)
    count = len(server.asked)
    with torch.no_grad():
        layer.lorasb_R["default"].add_(1.0)
    sampler(["a"], trainer)
    assert [path for path, _ in server.asked[count:]] == ["/v1/load_lora_adapter", "/v1/completions"]


def test_a_cast_basis_is_that_of_its_file(server: Server, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "basis")
    cast = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path / "basis")
    lorasb.VLLMSampler(server.address, folder=tmp_path).sync(cast)
    ((_, body),) = server.asked
    assert len(plugin._cores(Path(body["lora_path"]), plugin.read_basis(tmp_path / "basis"), torch.float32)) == 14


def test_a_refused_sync_leaves_no_files(server: Server, tmp_path: Path) -> None:
    sampler, server.status = lorasb.VLLMSampler(server.address, folder=tmp_path), 500
    with pytest.raises(RuntimeError, match="answered 500"):
        sampler.sync(model())
    assert list(sampler.folder.iterdir()) == []


def test_chats_are_rendered_as_the_trainer_does(server: Server, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def apply_chat_template(chats: Any, **options: Any) -> dict[str, Any]:
        given.append(options)
        return {"input_ids": [[7]] * len(chats)}

    trainer = grpo()
    trainer.processing_class = SimpleNamespace(apply_chat_template=apply_chat_template)
    sampler = lorasb.VLLMSampler(server.address, folder=tmp_path)
    server.answer = {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}]}
    sampler([[{"role": "user", "content": "x"}]], trainer)
    assert given[0]["enable_thinking"] is False
    assert (given[0]["tools"], given[0]["add_generation_prompt"]) == (None, True)
    with pytest.raises(ValueError, match="images are not sent to the sampler"):
        sampler([[{"role": "user", "content": [{"type": "image"}]}]], trainer)


def test_what_cannot_be_sent_is_refused(server: Server) -> None:
    with pytest.raises(ValueError, match=r"expected a vLLM server's address or a lorasb.VLLMSampler, got a int"):
        lorasb.sync_to_vllm(model(), 8000)
    with pytest.raises(ValueError, match=r"expected the address of a vLLM server or a vllm.LLM, got a int"):
        lorasb.VLLMSampler(8000)
    sharded = model()
    a_layer(sharded).lorasb_R["default"].data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="got shards of it"):
        lorasb.sync_to_vllm(sharded, server.address)
    two = model()
    two.add_adapter("ada", lorasb.LoRASBConfig(basis="default"))
    two.base_model.set_adapter(["default", "ada"])
    with pytest.raises(ValueError, match="adapters default, ada are active: name one"):
        lorasb.sync_to_vllm(two, server.address)
    scaled = model()
    a_layer(scaled).set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"has another scale than it was made with: set_scale\('default', 1.0\)"):
        lorasb.sync_to_vllm(scaled, server.address)
    for option, what in (
        ({"modules_to_save": ["norm"]}, "trained modules or token rows"),
        ({"bias": "lorasb_only"}, "trained biases"),
    ):
        more = lorasb.patch(with_basis().unload(), r=4, init="random", **option)
        for send in (lorasb.adapter_delta, lambda one: lorasb.sync_to_vllm(one, server.address)):
            with pytest.raises(ValueError, match=rf"has more than R \({what}\)"):
                send(more)
    assert server.asked == []
