"""The GGUF export in llama.cpp: base and adapter answer there as they do in torch."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
import transformers
from adapters import layers
from models import batches_for, generated, make, patched
from torch import nn

import lorasb
from lorasb.app.prepare import EMBEDDED, GGUF, embedded_folder, resolve_model
from lorasb.export.lora import ARCHITECTURES

PROMPTS = int(os.environ.get("LORASB_GGUF_PROMPTS", "4"))
ANSWER, TOKENS = " violet, amber and jade.", 6
THINGS = ("a door", "the sea", "my hat", "an old car", "that bird", "the tall tree", "her coat", "a small boat")
SAME = 0.9  # minimum share of equal greedy answers; llama.cpp multiplies 4-bit weights by activations in 8 bits


def prompts(count: int) -> list[str]:
    return [f"Question {i}: which colors has {THINGS[i % len(THINGS)]}? Answer:" for i in range(count)]


def fine_tuned(tokenizer: transformers.PreTrainedTokenizerBase) -> nn.Module:
    """SmolLM2 trained to give one answer to four questions."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(EMBEDDED), dtype=torch.float32)
    batches = []
    for prompt in prompts(4):
        asked, answered = tokenizer(prompt)["input_ids"], tokenizer(ANSWER)["input_ids"]
        ids = torch.tensor([asked + answered])
        labels = torch.tensor([[-100] * len(asked) + answered])
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    model = lorasb.patch(model, r=16)
    lorasb.initialize(model, batches, lr=1e-4, progress=False)
    optimizer = torch.optim.AdamW(lorasb.parameter_groups(model.train(), lr=2e-3))
    for step in range(16):
        model(**batches[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def answers_here(model: nn.Module, asked: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    count = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return [generated(model, torch.tensor([ids]), **count)[0, len(ids) :].tolist() for ids in asked]


def answers_there(asked: list[list[int]], adapter: Path | None) -> list[list[int]]:
    """Greedy answers of libllama."""
    from llama_cpp_py_sync import Llama
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    found = []
    with Llama(str(embedded_folder() / GGUF), n_ctx=256, n_threads=1) as llama:
        if adapter is not None:
            handle = lib.llama_adapter_lora_init(llama._model, str(adapter).encode())
            assert handle != ffi.NULL, "libllama refused the adapter"
            held, scales = ffi.new("struct llama_adapter_lora *[]", [handle]), ffi.new("float[]", [1.0])
            assert lib.llama_set_adapters_lora(llama._ctx, held, 1, scales) == 0
        for ids in asked:
            llama._clear_context_state()
            past, answer = llama._eval_tokens(ids, 0), []
            for _ in range(TOKENS):
                logits = ffi.buffer(lib.llama_get_logits_ith(llama._ctx, -1), 4 * llama.n_vocab)
                answer.append(int(np.frombuffer(logits, np.float32).argmax()))
                past = llama._eval_tokens(answer[-1:], past)
            found.append(answer)
    return found


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp_py_sync") is None, reason="no llama.cpp for this platform")
def test_llama_cpp_answers_as_torch_does(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(EMBEDDED))
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts(PROMPTS)]
    model = fine_tuned(tokenizer)
    path = lorasb.export_lora(model, tmp_path, format="gguf", quiet=True)
    assert path == tmp_path / "adapter.gguf"
    here, there, without = answers_here(model, asked), answers_there(asked, path), answers_there(asked, None)
    same = sum(a == b for a, b in zip(here, there, strict=True)) / len(asked)
    print(f"{len(asked)} prompts: {same:.0%} of greedy answers of {TOKENS} tokens are the same in torch and llama.cpp")
    assert same >= SAME
    assert sum(a == b for a, b in zip(without, there, strict=True)) / len(asked) < 1 - SAME
    with model.disable_adapter():
        plain = answers_here(model, asked, tokens=1)
    assert sum(a[0] == b[0] for a, b in zip(plain, without, strict=True)) / len(asked) > 1 - SAME


def read(model: nn.Module, folder: Path) -> Any:
    """Export a model's adapter, and return a reader of its file."""
    import gguf

    return gguf.GGUFReader(str(lorasb.export_lora(model, folder, format="gguf", quiet=True)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_every_layer_has_its_name(family: str, tmp_path: Path) -> None:
    model = lorasb.patch(make(family), r=4, init="kaiming")
    reader = read(model, tmp_path)
    names = {tensor.name for tensor in reader.tensors}
    assert len(names) == 2 * len(layers(model))
    assert all(name.startswith("blk.") for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    kind = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    assert kind == ARCHITECTURES[model.config.model_type][0]


def test_rows_of_q_and_k_turn_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    model = patched("llama")
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in read(model, tmp_path).tensors}
    attention = model.base_model.model.model.layers[0].self_attn
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        want = getattr(attention, ours).get_delta_weight("default")
        found = tensors[f"blk.0.{theirs}.weight.lora_b"] @ tensors[f"blk.0.{theirs}.weight.lora_a"]
        if heads:  # row i of a head and its partner half a head further become neighbors
            want = want.view(heads, 2, -1, want.shape[1]).transpose(1, 2).flatten(0, 2)
        tolerances.check(found, want, tolerances.EXPORT)


def test_what_has_no_gguf(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path / "adapter")
    for source, kind, message in (
        (patched("gpt2"), "gguf", "no GGUF adapter for model type 'gpt2'"),
        (patched(), "onnx", "format must be one of peft, vllm, gguf"),
        (tmp_path / "adapter", "gguf", "needs its base's configuration"),
    ):
        with pytest.raises(ValueError, match=message):
            lorasb.export_lora(source, tmp_path / "out", format=kind, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_a_full_disk_cut_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf writes small tensors through a buffer, whose last error is lost."""
    gguf = pytest.importorskip("gguf")
    model = patched("llama", init="update")
    lorasb.export_lora(model, tmp_path, format="gguf", quiet=True)
    before = (tmp_path / "adapter.gguf").read_bytes()
    close = gguf.GGUFWriter.close

    def cut(writer: Any) -> None:
        close(writer)
        os.truncate(writer.path, len(before) - 600)

    monkeypatch.setattr(gguf.GGUFWriter, "close", cut)
    with pytest.raises(OSError, match=r"adapter\.gguf cannot be written: it is truncated"):
        lorasb.export_lora(model, tmp_path, format="gguf", quiet=True)
    assert (tmp_path / "adapter.gguf").read_bytes() == before


def test_a_folder_beside_its_base(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    model = lorasb.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    one = lorasb.export_lora(model, tmp_path / "one", format="gguf", quiet=True)
    two = lorasb.export_lora(tmp_path / "adapter", tmp_path / "two", format="gguf", quiet=True)
    assert one.read_bytes() == two.read_bytes()
