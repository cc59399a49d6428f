"""The model and the data of tests that run commands: seconds on one core."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import environment  # noqa: F401  before anything reads it
import torch
import transformers
from models import llama

WORDS = ["one", "two", "three", "four", "red", "blue", "green", "cat", "dog", "tree"]


def make_tiny(folder: Path) -> Path:
    """A folder with a model and a tokenizer of whole words and letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, *letters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    llama(vocab_size=len(vocabulary), eos_token_id=1, bos_token_id=None).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Iterable[Mapping[str, object]]) -> str:
    """Write JSON Lines; the file's path, as a setting."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


def make_data(file: Path) -> Path:
    """ "copy WORD" -> "WORD", thirty times."""
    rows = [{"prompt": f"copy {WORDS[i % 10]} {i % 7}", "completion": WORDS[i % 10]} for i in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file
