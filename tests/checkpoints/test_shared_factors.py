"""Checkpoints of a run share A and B, and each still loads by itself."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tolerances
from adapters import layers, unchanged
from gradients import factors
from models import logits, make, patched
from safetensors.torch import load_file
from tolerances import check_equal
from torch import nn
from trainer_runs import train

import lorasb
from lorasb.checkpoints.adapter_file import read_config, read_cores
from lorasb.checkpoints.shared_factors import FACTORS_NAME, share
from lorasb.layers import lookup


def run_of(folder: Path, steps: int = 3, model: Any = None, resume: Any = None, **options: Any) -> Any:
    """The trainer of a run that saves after every step; `options` go to `InitCallback`."""
    model = lorasb.patch(make("llama"), r=4) if model is None else model
    callbacks = [lorasb.InitCallback(num_samples=4, **options)]
    return train(model, folder, callbacks, resume=resume, max_steps=steps, warmup_steps=1, save_steps=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The output folder of a run of three steps, and its model."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_of(folder).model.eval()


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_and_b_are_stored_once(run: tuple[Path, nn.Module]) -> None:
    folder, model = run
    files = [folder / f"checkpoint-{step}" / FACTORS_NAME for step in (1, 2, 3)]
    assert len({os.stat(file).st_ino for file in files}) == 1
    cores = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lorasb_R" in n)
    assert files[0].stat().st_mode & 0o777 == 0o644
    for step in (1, 2, 3):
        weights = folder / f"checkpoint-{step}" / "adapter_model.safetensors"
        assert not any("lorasb_A" in key or "lorasb_B" in key for key in load_file(weights))
        assert weights.stat().st_size < cores + 4096


def test_every_checkpoint_loads_by_itself(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = run
    for place in (folder / "checkpoint-3", Path(shutil.copytree(folder / "checkpoint-3", tmp_path / "elsewhere"))):
        again = peft.PeftModel.from_pretrained(make("llama"), place).eval()
        tolerances.check(logits(again), logits(model), tolerances.EXACT)
        lorasb.export_lora(place, tmp_path / "lora", quiet=True)
        plain = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "lora").eval()
        tolerances.check(logits(plain), logits(model), tolerances.EXPORT)
    model.load_adapter(folder / "checkpoint-1", "first")
    model.set_adapter("first")
    assert (logits(model) - logits(again)).abs().max() > 0
    model.set_adapter("default")
    model.delete_adapter("first")


def test_a_run_resumes_from_its_checkpoints(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = run_of(tmp_path, resume=True)
    tolerances.check_equal(factors(resumed.model), factors(model))
    assert len({(tmp_path / f"checkpoint-{step}" / FACTORS_NAME).stat().st_ino for step in (2, 3)}) == 1


def test_a_damaged_or_closed_neighbor_gives_no_factors(
    run: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of a damaged file has the right digest, but its A and B are others."""
    for step in (1, 2):
        shutil.copytree(run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    first, second = (tmp_path / f"checkpoint-{step}" / FACTORS_NAME for step in (1, 2))
    flip_last_byte(first)
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / FACTORS_NAME).write_bytes(b"cut short")
    model = peft.PeftModel.from_pretrained(make("llama"), second.parent).eval()
    model.save_pretrained(tmp_path / "checkpoint-3")
    second.unlink()
    share(tmp_path / "checkpoint-3")
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "checkpoint-3").eval()
    tolerances.check(logits(again), logits(model), tolerances.EXACT)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    model.save_pretrained(tmp_path / "checkpoint-4")
    monkeypatch.setattr(Path, "iterdir", refuse)
    share(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / FACTORS_NAME).is_file()


@pytest.mark.parametrize("name", ["default", "other"])
def test_an_adapter_without_its_weights_is_refused_and_leaves_no_adapter(
    run: tuple[Path, nn.Module], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(run[0] / "checkpoint-3", tmp_path / "adapter"))
    model = peft.PeftModel.from_pretrained(make("llama"), folder).eval()
    (folder / "adapter_model.safetensors").unlink()
    message = r"expected adapter_model\.safetensors in .*adapter, found none"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(folder, name)
    base = make("llama")
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, folder)
    assert not any("lorasb" in key for key, _ in base.named_parameters())


def test_whole_files_on_request(tmp_path: Path) -> None:
    run_of(tmp_path, 1, share_factors=False)
    assert not (tmp_path / "checkpoint-1" / FACTORS_NAME).exists()
    assert any("lorasb_A" in key for key in load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors"))


def test_without_hard_links(run: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    _, model = run
    for step in (1, 2):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", selected_adapters=["default"])
        share(tmp_path / f"checkpoint-{step}")
    one, two = (tmp_path / f"checkpoint-{step}" / FACTORS_NAME for step in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_ino != two.stat().st_ino


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, r"holds R alone, and its lorasb_factors\.safetensors"),
        (flip_last_byte, r"lorasb_factors\.safetensors is damaged"),
    ],
)
def test_factors_that_are_gone_or_damaged_are_named_and_leave_the_adapter(
    run: tuple[Path, nn.Module], tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    bad = Path(shutil.copytree(run[0] / "checkpoint-3", tmp_path / "one"))
    harm(bad / FACTORS_NAME)
    model = lorasb.patch(make("llama"), r=4)
    for call in (
        lambda: peft.PeftModel.from_pretrained(make("llama"), bad),
        lambda: lorasb.export_lora(bad, tmp_path / "out"),
        lambda: model.load_adapter(bad, "second"),
        lambda: model.load_adapter(bad, "default", is_trainable=True),  # as Trainer resumes
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.load_adapter(run[0] / "checkpoint-2", "default", is_trainable=True)
    model.load_adapter(run[0] / "checkpoint-3", "second")  # the name is still free after a failed load
    assert set(model.peft_config) == {"default", "second"}
    assert all(value.any() for value in factors(model).values())


def test_resuming_from_another_runs_folder_and_under_another_name(tmp_path: Path) -> None:
    old = tmp_path / "old" / "checkpoint-2"
    model, fresh = (lorasb.patch(make("llama"), r=4, adapter_name="mine") for _ in range(2))
    run_of(tmp_path / "old", 2, model)
    assert (old / "mine" / FACTORS_NAME).is_file()
    resumed = run_of(tmp_path / "new", 3, fresh, str(old))
    assert resumed.state.global_step == 3
    config = peft.PeftConfig.from_pretrained(old / "mine")
    again = peft.PeftModel.from_pretrained(make("llama"), old / "mine", config=config)
    tolerances.check(logits(again.eval()), logits(model.eval()), tolerances.EXACT)


def test_a_loader_that_reads_one_file_is_refused(run: tuple[Path, nn.Module]) -> None:
    model = make("llama")
    model.load_adapter(run[0] / "checkpoint-3")
    with pytest.raises(ValueError, match="holds R alone"):
        logits(model)


def test_the_r_of_an_adapter_is_read_at_the_scale_of_its_basis(tmp_path: Path) -> None:
    model = patched(scaling=0.5)
    model.save_pretrained(tmp_path)
    config, own = read_config(tmp_path), {name: layer.lorasb_R["default"] for name, layer in layers(model).items()}
    digests = lookup.digests(layers(model), "default")
    check_equal(read_cores(tmp_path, config, digests), {name: core * 0.5 for name, core in own.items()})
    check_equal(read_cores(tmp_path, config, digests, dict.fromkeys(own, 0.5)), own)
    first = next(iter(own))
    check_equal(read_cores(tmp_path, config, digests, {first: 2.0}), {first: own[first] * 0.25})
    share(tmp_path)
    check_equal(read_cores(tmp_path, config, digests, {first: 0.5}), {first: own[first]})


def test_no_r_is_read_on_another_basis_or_with_modules(tmp_path: Path) -> None:
    model = patched(modules_to_save=["norm"])
    model.save_pretrained(tmp_path)
    config, digests = read_config(tmp_path), lookup.digests(layers(model), "default")
    with pytest.raises(ValueError, match=r"other A and B than the basis, or the same in another dtype: load the base"):
        read_cores(tmp_path, config, [bytes(32)])
    with pytest.raises(ValueError, match=r"has more than R \(.*norm.weight, \.\.\.\): .*Load it as an adapter"):
        read_cores(tmp_path, config, digests)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors in .*, found none"):
        read_cores(tmp_path, config, digests)
