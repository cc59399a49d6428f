"""The examples of a run: what is held out, and files that hold none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasb.app.data import load_examples
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


def test_data_that_is_empty_or_has_a_broken_line_is_refused(base: Settings, tmp_path: Path) -> None:
    file, output = tmp_path / "data.jsonl", tmp_path / "run"
    for text, message in (
        ("", "holds no examples"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt"', "line 2: expected an object"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_finetune(replace(base, data=str(file), output=str(output)))
    assert not output.exists()


def test_a_tenth_is_held_out_where_no_file_is_given(data: Path) -> None:
    train, held_out = load_examples(Settings(data=str(data)))
    assert len(held_out) == 3
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
