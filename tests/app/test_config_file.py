"""Settings as YAML: what is written is read again, and what is wrong is named with its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorasb.app import config_file
from lorasb.app.settings import Settings, listed

KNOWN = {one.name: kind for one, kind in listed(Settings)}


def test_the_files_defaults_are_the_lists(tmp_path: Path) -> None:
    config_file.write_config(tmp_path / "a.yaml", Settings())
    assert Settings(**config_file.read_config(tmp_path / "a.yaml", KNOWN)) == Settings()
    assert set(yaml.safe_load((tmp_path / "a.yaml").read_text())) == set(KNOWN) - {"resume"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"there is no setting 'learning_rte': did you mean 'learning_rate'\?"),
        ("optimizer: adam", r"there is no setting 'optimizer': --help-all lists them"),
        ("lr: 1\nlearning_rate: 2", "'learning_rate' is another name of 'lr', which the file has too"),
        ("batchsize: 4", r"there is no setting 'batchsize': did you mean 'batch_size'\?"),
        ("batch-sizes: 4", r"there is no setting 'batch-sizes': did you mean 'batch_size'\?"),
        ("lr: fast", "lr expects a number, got 'fast'"),
        ("seed: 1.5", "seed expects a whole number, got 1.5"),
        ("seed: true", "seed expects a whole number, got True"),
        ("packing: 3", "packing expects true or false, got 3"),
        ("model: [a]", r"model expects a text, got \['a'\]"),
        ("rank_pattern: 3", "rank_pattern expects ranks by name, like down_proj=96,q_proj=32 or JSON, got 3"),
        ("- a", "expected lines like `lr: 0.002`, got list"),
        ("a: [", "this is no YAML"),
        ("!!python/object/apply:os.getcwd []", "this is no YAML"),
    ],
)
def test_wrong_lines_are_named_with_their_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"--config .*a.yaml: {message}"):
        config_file.read_config(tmp_path / "a.yaml", KNOWN)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a YAML file of settings"):
        config_file.read_config(tmp_path / "none.yaml", KNOWN)


@pytest.mark.parametrize("text", ["down_proj=96,q_proj=32", '{"down_proj": 96, "q_proj": 32}'])
def test_ranks_by_name_are_pairs_or_json(text: str) -> None:
    assert config_file.typed(text, dict[str, int], "x") == {"down_proj": 96, "q_proj": 32}


@pytest.mark.parametrize("text", ["down_proj", "down_proj=x", '{"a": "b"}', "{", "[1]"])
def test_what_is_no_ranks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--rank-pattern expects ranks by name"):
        config_file.typed(text, dict[str, int], "--rank-pattern")
