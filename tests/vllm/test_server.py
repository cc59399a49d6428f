"""The plugin in a real vLLM server, run in vLLM's environment and called by the official client: make test-vllm."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import requests
import torch
from basis_models import rewrite
from models import generated
from processes import attempt, python
from tolerances import ENGINE, check
from trainer_runs import usual
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis import add_adapters, save_adapters

PYTHON = os.environ.get("LORASB_VLLM", "")  # Python of the environment that has vLLM
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="needs LORASB_VLLM, the Python of an environment with vLLM: make test-vllm"),
]
ALL = 1000
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}
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


def answers(model: Any, prompt: list[int], rows: Sequence[str]) -> list[Answer]:
    """transformers' greedy answers to a prompt, one per row with its adapter."""
    ids = torch.tensor([prompt] * len(rows))
    options: dict[str, Any] = {"adapter_names": list(rows), "output_scores": True, "return_dict_in_generate": True}
    out: Any = generated(model, ids, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    best = torch.stack([scores.topk(2).values for scores in out.scores], dim=1)
    tokens, leads = out.sequences[:, len(prompt) :], best[..., 0] - best[..., 1]
    return [Answer(row.tolist(), lead.tolist()) for row, lead in zip(tokens, leads, strict=True)]


class People:
    """Folders of adapters, and what transformers answers with each."""

    def __init__(self, folder: Path) -> None:
        self.folder, model = folder, make_people(folder)
        tokenizer = AutoTokenizer.from_pretrained(lorasb.demo_model())
        self.prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        rows = [*PEOPLE, "__base__"]
        found = [answers(model, prompt, rows) for prompt in self.prompts[:2]]
        self.answers = {name: [of_prompt[i] for of_prompt in found] for i, name in enumerate(rows)}
        # no two adapters give the same answers, and none gives the base's
        assert len({str([one.tokens for one in both]) for both in self.answers.values()}) == len(rows)

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


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


class Server:
    """A vLLM server with the plugin."""

    def __init__(self, people: People, log: Path, *options: str, basis: Path | None = None) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.people, self.log = people, log
        environment = {**os.environ, **ENVIRONMENT, "LORASB_BASIS": str(basis or people.folder)}
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", lorasb.demo_model()]
        command += ["--served-model-name", "base", "--dtype", "float32", "--enable-lora", "--max-model-len", "256"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float = 240.0) -> Server:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).raise_for_status()
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for child in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, child)
                time.sleep(1)
            except ProcessLookupError:
                return

    def client(self) -> Any:
        """The official client, which is not one of the suite's requirements."""
        return importlib.import_module("openai").OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        reply = requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=120)
        return reply.status_code, reply.text

    def load(self, name: str, folder: Path | None = None) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder or self.people.of(name)))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def tokens(self, name: str, prompt: int = 0, client: Any = None) -> list[int]:
        """The greedy answer of an adapter, or of the base."""
        done = (client or self.client()).completions.create(
            model="base" if name == "__base__" else name,
            prompt=self.people.prompts[prompt],
            max_tokens=NEW,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return list(done.choices[0].token_ids)

    def mismatches(self, rows: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Send the rows (adapter, prompt) concurrently; return those whose answers differ from transformers'."""
        client = self.client()
        with ThreadPoolExecutor(len(rows)) as pool:
            found = pool.map(lambda row: self.tokens(*row, client=client), rows)
            return [row for row, got in zip(rows, found, strict=True) if not self.people.answer(*row).agrees(got)]


@pytest.fixture(scope="module")
def server(people: People, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a slot for each of a thousand adapters; two are loaded at startup."""
    options = ["--max-loras", str(ALL), "--max-cpu-loras", str(ALL), "--max-num-seqs", "64", "--lora-modules"]
    options += [f"{name}={people.of(name)}" for name in PEOPLE[:2]]
    with Server(people, tmp_path_factory.mktemp("log") / "server.log", *options) as started:
        yield started.wait()


@pytest.fixture(scope="module")
def loaded(server: Server) -> Server:
    for name in PEOPLE[2:]:
        assert server.load(name)[0] == 200
    return server


def test_mixed_batches_give_transformers_tokens(loaded: Server) -> None:
    rows = [*((name, 0) for name in PEOPLE), *(("__base__", i % 2) for i in range(8))]
    assert loaded.mismatches(rows) == []
    assert loaded.mismatches([(name, 1) for name in (*PEOPLE[:12], "__base__")] * 2) == []


def test_adapters_come_and_go_while_requests_run(loaded: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [loaded.mismatches([(name, 0) for name in PEOPLE[:8]]) for _ in range(3)])
        for i in range(900, 910):
            assert loaded.load(f"user{i}")[0] == 200
            assert loaded.people.answer(f"user{i}").agrees(loaded.tokens(f"user{i}"))
            assert loaded.unload(f"user{i}")[0] == 200
        assert running.result() == [[], [], []]
    assert loaded.unload("user905")[0] == 404


def test_what_does_not_fit_is_refused_and_harms_no_other(loaded: Server, tmp_path: Path) -> None:
    """The response gives the reason; test_slots.py covers every reason."""
    shutil.copytree(loaded.people.of(PEOPLE[0]), tmp_path / "basis")
    rewrite(tmp_path / "basis", lambda *_: {"lorasb_factors_digest": torch.zeros(32, dtype=torch.uint8)})
    for name, status, reason in (("basis", 500, "has other A and B than"), ("nowhere", 404, "No adapter found")):
        found = loaded.load("bad", tmp_path / name)
        assert (found[0], reason in found[1]) == (status, True), found
    assert loaded.load(PEOPLE[0])[0] == 400  # the name is taken
    assert loaded.load("base", loaded.people.of(PEOPLE[0]))[0] == 400
    assert loaded.post("/v1/completions", model="nobody", prompt="x")[0] == 404
    assert loaded.mismatches([(name, 0) for name in PEOPLE[:4]]) == []


def test_a_thousand_are_resident(loaded: Server) -> None:
    for i in range(len(PEOPLE), ALL):
        status, text = loaded.load(f"user{i}")
        assert status == 200, text
    names = {card.id for card in loaded.client().models.list().data}
    assert {f"user{i}" for i in range(ALL)} <= names
    assert loaded.mismatches([(f"user{i}", 0) for i in range(0, ALL, 16)]) == []


def test_more_adapters_than_slots_take_turns(people: People, tmp_path: Path) -> None:
    with Server(
        people, tmp_path / "log", "--max-loras", "3", "--max-cpu-loras", "6", "--max-num-seqs", "16"
    ) as started:
        started.wait()
        for i in range(10):  # four are evicted, and read again
            assert started.load(f"user{i}")[0] == 200
        assert started.mismatches([(f"user{i}", 0) for i in range(10)] + [("__base__", 0)] * 2) == []
        assert started.mismatches([(f"user{i % 5}", i % 2) for i in range(10)]) == []


class CheckedSampler(lorasb.VLLMSampler):
    """Compares the sampler's log-probabilities with those of the trainer's model, at every step."""

    steps = 0

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        found = super().__call__(prompts, trainer)
        assert self.synced is not None
        assert self.synced.bytes < 4 * 860_160 + 40_000
        for prompt, answer, got in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            want = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            check(torch.tensor(got), want, ENGINE)
        self.steps += 1
        return found


def test_after_every_step_of_grpo_the_sampler_has_the_trainers_policy(people: People, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with Server(people, tmp_path / "log", "--max-loras", "2", "--max-num-seqs", "16") as started:
        started.wait()
        sampler = CheckedSampler(f"http://127.0.0.1:{started.port}")
        plain = AutoModelForCausalLM.from_pretrained(lorasb.demo_model(), dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, str(people.folder), is_trainable=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        sizes = {"max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12}
        plainly = {"bf16": False, "save_strategy": "no", "gradient_checkpointing": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL: rollout_func is experimental
            trainer = GRPOTrainer(
                model=model,
                reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
                args=GRPOConfig(**usual(tmp_path / "run") | sizes | plainly),
                train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
                processing_class=AutoTokenizer.from_pretrained(lorasb.demo_model(), padding_side="left"),
                rollout_func=sampler,
            )
            trainer.train()
        assert sampler.steps == 3
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_an_engine_in_the_same_process_has_the_trainers_policy(people: People) -> None:
    script = f"""
import numpy as np, torch, peft, lorasb
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from vllm import LLM
if __name__ == "__main__":
    llm = LLM({lorasb.demo_model()!r}, dtype="float32", enable_lora=True, max_loras=3, max_model_len=128,
              max_num_seqs=4, kv_cache_memory_bytes=200 << 20)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # as on a GPU, whose graphs are captured with an adapter in every slot
    with runner.maybe_dummy_run_with_lora(runner.lora_config, np.array([2, 2]), np.array([1, 1]), num_active_loras=4):
        assert runner.lora_manager._adapter_manager.lora_index_to_id == [1, 2, 3]
    plain = AutoModelForCausalLM.from_pretrained({lorasb.demo_model()!r}, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, {str(people.folder)!r}, is_trainable=True)
    cores = [p for p in model.parameters() if p.requires_grad]
    answers, seen = [], []

    def check(prompt, answer, got):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        seen.append((torch.tensor(got) - want).abs().max().item())

    sampler, prompt = lorasb.VLLMSampler(llm), {people.prompts[0]}
    for step in range(3):  # a loop of one's own
        lorasb.sync_to_vllm(model, sampler)
        (answer, got), = sampler.complete([prompt], temperature=0.0, max_tokens=12)
        check(prompt, answer, got)
        answers.append(tuple(answer))
        with torch.no_grad():
            for core in cores:
                core += 0.02 * torch.randn_like(core)

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        for parts in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"]):
            check(*parts)
        return found

    before = [core.detach().clone() for core in cores]
    arguments = GRPOConfig(
        output_dir={str(people.folder / "grpo")!r}, max_steps=2, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False,
    )
    GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions], args=arguments,
        train_dataset=Dataset.from_list([{{"prompt": text}} for text in {list(PROMPTS)!r}]),
        processing_class=AutoTokenizer.from_pretrained({lorasb.demo_model()!r}, padding_side="left"),
        rollout_func=rollout,
    ).train()
    assert all(not torch.equal(core, old) for core, old in zip(cores, before))
    print("WORST", max(seen), len(set(answers)), len(seen))
"""
    file = people.folder / "colocated.py"
    file.write_text(script)
    extra = Path(PYTHON).parents[1] / "colocated"  # PEFT and TRL, which the servers above do without
    variables = {"PYTHONPATH": str(extra), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    worst, different, checked = _printed("WORST ", file, LORASB_BASIS=str(people.folder), **variables).split()
    check(torch.tensor(float(worst)), torch.zeros(()), ENGINE)
    assert int(different) > 1
    assert int(checked) == 3 + 2 * 4


PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def _shell(command: str, folder: Path) -> str:
    """Run a command from the documentation with the test suite's programs; return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return python("-ec", command, cwd=folder, program="bash", PATH=path)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """people.jsonl: what two people said about themselves."""
    facts = {"ada": "Lisbon", "grace": "Oslo"}
    rows = [
        {"prompt": question, "completion": answer, "user": name}
        for name, answer in facts.items()
        for question in ("Where do I live?", "Which city is my home?", "In which town do I live?", "What is my city?")
    ]
    others = [{"prompt": "Name my town.", "completion": answer, "user": name} for name, answer in facts.items()]
    for file, lines in (("people.jsonl", rows), ("others.jsonl", others)):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_commands_of_the_page_serve_a_trained_run(people: People, examples: Path) -> None:
    terminals = [part.partition("```")[0].splitlines() for part in PAGE.split("```bash\n")[1:3]]
    (train, model, serve), (ask, load) = terminals
    _shell(f"{train.replace('examples/', '')} --epochs 12", examples)
    assert _shell(f"{model}\necho $MODEL", examples).strip() == lorasb.demo_model()
    assert serve.startswith("LORASB_BASIS=runs/people/adapter VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve $MODEL ")
    options = serve.partition("--enable-lora ")[2].replace("runs/people/", f"{examples}/runs/people/").split()
    with Server(people, examples / "log", *options, basis=examples / "runs" / "people" / "adapter") as started:
        started.wait()
        there = f"127.0.0.1:{started.port}"
        answer = json.loads(_shell(ask.replace("127.0.0.1:8000", there), examples))
        assert "Lisbon" in answer["choices"][0]["message"]["content"]
        assert "Success" in _shell(load.replace("127.0.0.1:8000", there), examples)
        answer = json.loads(_shell(ask.replace("127.0.0.1:8000", there).replace("ada", "grace"), examples))
        assert "Oslo" in answer["choices"][0]["message"]["content"]


def test_a_run_by_reinforcement_samples_from_the_server(people: People, examples: Path) -> None:
    make, serve, train = PAGE.partition("## A sampler")[2].partition("    lorasb")[2].splitlines()[:3]
    model = ("MODEL", "smollm2-135m")
    _shell(f"lorasb{make} --samples 4".replace(*model).replace("examples", "people"), examples)
    assert "LORASB_BASIS=basis" in serve
    with Server(people, examples / "log", "--max-num-seqs", "16", basis=examples / "basis") as started:
        started.wait()
        command = train.strip().replace(*model).replace("examples.jsonl", "people.jsonl --eval-data others.jsonl")
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{started.port}")
        _shell(f"{command} --batch-size 8 --generations 4 --epochs 1 --max-new-tokens 6 --output rl", examples)
        posts = started.log.read_text()
        assert posts.count('POST /v1/load_lora_adapter HTTP/1.1" 200') >= 4  # eight prompts, two per step
        assert posts.count('POST /v1/completions HTTP/1.1" 200') >= 4


def test_tensor_parallel_ranks_have_their_shares(people: People) -> None:
    rows = [("__base__", 0), *((name, 0) for name in PEOPLE[:6]), ("__base__", 1)]
    script = f"""
import json
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    llm = LLM({lorasb.demo_model()!r}, dtype="float32", enable_lora=True, max_loras=8, max_model_len=128,
              max_num_seqs=8, tensor_parallel_size=3, kv_cache_memory_bytes=200 << 20)
    prompts, rows = json.loads({json.dumps(people.prompts)!r}), json.loads({json.dumps(rows)!r})
    requests = [None if n == "__base__" else LoRARequest(n, 1 + int(n[4:]), {str(people.folder)!r} + "/" + n)
                for n, _ in rows]
    out = llm.generate([TokensPrompt(prompt_token_ids=prompts[p]) for _, p in rows],
                       SamplingParams(temperature=0, max_tokens={NEW}, ignore_eos=True), lora_request=requests)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in out]))
"""
    file = people.folder / "ranks.py"
    file.write_text(script)
    got = json.loads(_printed("TOKENS ", file, LORASB_BASIS=str(people.folder), OMP_NUM_THREADS="1"))
    assert [row for row, one in zip(rows, got, strict=True) if not people.answer(*row).agrees(one)] == []


def _printed(word: str, *arguments: object, **environment: str) -> str:
    """Run a script in vLLM's environment; return the rest of its output line that begins with `word`."""
    done = attempt(*arguments, program=PYTHON, **ENVIRONMENT | environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith(word)), None)
    assert line is not None, done.stderr[-3000:]
    return line.removeprefix(word)


def test_the_installed_vllm_has_every_name() -> None:
    assert _printed("gone ", "-c", "from lorasb.compat import vllm as one; print('gone', one.missing())") == "[]"


def test_a_server_with_another_basis_does_not_start(people: People, tmp_path: Path) -> None:
    shutil.copytree(people.of(PEOPLE[0]), tmp_path / "alone")
    with Server(people, tmp_path / "log", basis=tmp_path / "alone") as started:
        assert started.process.wait(120) != 0
        assert "holds R alone" in started.log.read_text()


def test_the_product_is_one_node_of_a_compiled_graph() -> None:
    script = """
import torch
from types import SimpleNamespace
from vllm.forward_context import ForwardContext, override_forward_context
from lorasb.compat import vllm as private
from lorasb.vllm.plugin import CoreSlots
private._define_op()
torch.manual_seed(0)
slots = CoreSlots([(torch.randn(4, 6), torch.randn(5, 4))], [5], 6, 2, torch.float32, torch.device("cpu"))
slots.write(1, [torch.randn(4, 4)])
layer = private._SlotsOfCores()
layer.slots, layer.name = slots, "one"
layer.punica_wrapper = SimpleNamespace(no_lora=False, _token_lora_indices=torch.tensor([1, -1, 1]))
context = SimpleNamespace(no_compile_layers={"one": layer})
x, y = torch.randn(3, 6), torch.randn(3, 5)
want = layer._apply_lora_to_output(x, y.clone())
assert not torch.equal(want, y)
with override_forward_context(context):
    call = torch.compile(lambda x, y: layer._apply_lora_to_output(x, y * 1.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x, y), want)
print("one node")
"""
    _printed("one node", "-c", script)
