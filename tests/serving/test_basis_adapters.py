"""Many adapters on a basis at once: what PEFT's way makes one by one, all of them or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from basis_models import a_layer, fill, with_basis, with_users
from models import batches_for, patched
from safetensors.torch import load_file, save_file

import lorasb
from lorasb.layers.adapter_state import FrozenFactors
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis_adapters import load_adapters

NAMES = ["ada", "emmy", "grace"]


def state(model: Any) -> dict[str, Any]:
    """All that the layers know of their adapters, their parameters, flags and configs."""
    found: dict[str, Any] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRASBLinear):
            states = {name: replace(state, preconditioner=None) for name, state in layer.adapters.items()}
            found[path] = states, set(layer.lorasb_R.stored_16bit), layer.active_adapters
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{path} parameter"] = (parameter.tolist(), parameter.requires_grad, parameter.dtype)
    return found | {f"{name} config": config.to_dict() for name, config in model.peft_config.items()}


@pytest.mark.parametrize("start", ["zero", "same"])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7, "wide_factors": True}], ids=str)
def test_they_are_what_peft_adds_one_by_one(start: Any, options: dict[str, Any]) -> None:
    one_by_one, at_once = with_basis(**options), with_basis(**options)
    for name in NAMES:
        one_by_one.add_adapter(name, lorasb.LoRASBConfig(basis="default", basis_start=start))
    lorasb.add_adapters(at_once, iter(NAMES), basis_start=start)
    assert state(at_once) == state(one_by_one)
    layer = a_layer(at_once)
    assert layer.lorasb_A["grace"] is layer.lorasb_A["default"]
    assert len({layer.lorasb_R[name].data_ptr() for name in ("default", *NAMES)}) == 4


def test_they_train_are_saved_and_are_deleted(tmp_path: Path) -> None:
    model = with_basis()
    lorasb.add_adapters(model, NAMES)
    model.set_adapter("emmy")
    assert a_layer(model).lorasb_R["emmy"].requires_grad
    for seed, name in enumerate(NAMES):
        fill(model, name, seed)
    batch = batches_for("llama", count=1)[0]
    with torch.no_grad():
        want = model(**batch).logits
        model.save_pretrained(str(tmp_path))
        model.set_adapter("default")
        model.delete_adapter("emmy")
        model.load_adapter(str(tmp_path / "emmy"), "emmy")
        model.set_adapter("emmy")
        assert torch.equal(model(**batch).logits, want)


def test_r_s_come_from_files_for_those_that_are_there_and_those_that_are_not(tmp_path: Path) -> None:
    saved = with_users(*NAMES)
    saved.save_pretrained(str(tmp_path))
    model = with_basis()
    lorasb.add_adapters(model, NAMES[:1])
    load_adapters(model, tmp_path, NAMES)
    for name in NAMES:
        for path, layer in layers_with(saved, name).items():
            assert torch.equal(layers_with(model, name)[path].lorasb_R[name], layer.lorasb_R[name])
    other = lorasb.patch(with_basis().unload(), r=4, init="random")
    with pytest.raises(ValueError, match="has other A and B"):
        load_adapters(other, tmp_path, NAMES)
    assert set(other.peft_config) == {"default"}


def test_modules_of_their_own_are_made_by_peft() -> None:
    model = patched("roberta", task_type="SEQ_CLS")
    lorasb.add_adapters(model, ["one", "two"])
    heads = [name for name, _ in model.named_parameters() if "modules_to_save.two" in name]
    assert heads


BAD: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "taken": (["ada", "default"], {}, "has an adapter 'default' already"),
    "of the rows of nobody": (["__base__"], {}, "expected a name without dots"),
    "of a dictionary": (["ada", "keys"], {}, "a method's of a dictionary, got 'keys'"),
    "twice": (["ada", "ada"], {}, "or it is named twice"),
    "dots": (["a.b"], {}, "expected a name without dots"),
    "no text": ([3], {}, "expected a name without dots for each adapter, .* got 3"),
    "no basis": (["ada"], {"basis": "missing"}, "basis='missing' is no adapter of this model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names_leave_the_model_as_it_was(name: str) -> None:
    names, options, message = BAD[name]
    model = with_basis()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        lorasb.add_adapters(model, names, **options)
    assert state(model) == before


def test_a_text_and_names_of_the_bank_are_refused() -> None:
    model = with_basis()
    with pytest.raises(ValueError, match="expected several names, got the text 'ab'"):
        lorasb.add_adapters(model, "ab")
    lorasb.AdapterBank(model).add("ada")
    with pytest.raises(ValueError, match="the model or its bank has an adapter 'ada' already"):
        lorasb.add_adapters(model, NAMES)


def test_one_that_fails_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_basis()
    before, whole = state(model), LoRASBLinear.copy_adapter

    def fails(layer: LoRASBLinear, like: str, name: str) -> None:
        if name == "grace":
            raise KeyboardInterrupt
        whole(layer, like, name)

    monkeypatch.setattr(LoRASBLinear, "copy_adapter", fails)
    with pytest.raises(KeyboardInterrupt):
        lorasb.add_adapters(model, NAMES)
    assert state(model) == before


def test_of_none_nothing_and_of_hundreds_one_is_added_by_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_basis()
    before, add, calls = state(model), type(model).add_adapter, []
    lorasb.add_adapters(model, [])
    assert state(model) == before
    monkeypatch.setattr(
        type(model), "add_adapter", lambda self, name, config: calls.append(name) or add(self, name, config)
    )
    lorasb.add_adapters(model, [f"user-{i}" for i in range(200)])
    assert calls == ["user-0"]
    assert len(model.peft_config) == 201


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_in_the_middle_of_a_copy_leaves_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_basis()
    before, count = state(model), iter(range(99))
    real = FrozenFactors.__setattr__

    def fails(self: FrozenFactors, name: str, value: Any) -> None:
        if name == "grace" and next(count) == at:
            raise KeyboardInterrupt
        real(self, name, value)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(FrozenFactors, "__setattr__", fails)
        with pytest.raises(KeyboardInterrupt):
            lorasb.add_adapters(model, NAMES)
    assert state(model) == before
    lorasb.add_adapters(model, NAMES)


def damaged(folder: Path, kind: str) -> None:
    """A file of R's that is not what the model needs."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "lorasb_R" in name)
    value = tensors.pop(key)
    if kind != "missing":
        tensors[key] = {"small": value[:1, :1], "other": torch.zeros(3, 3), "nan": value * float("nan")}[kind].clone()
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "was cut short"), ("small", r"\[1, 1\]"), ("other", r"\[3, 3\]"), ("nan", "finite|NaN")],
)
def test_a_damaged_file_is_refused_and_the_model_stays(kind: str, message: str, tmp_path: Path) -> None:
    with_users(*NAMES).save_pretrained(str(tmp_path))
    damaged(tmp_path / "grace", kind)
    model = with_basis()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path, NAMES)
    assert state(model) == before


def test_one_of_other_factors_is_not_loaded_over(tmp_path: Path) -> None:
    with_users(*NAMES).save_pretrained(str(tmp_path))
    model = with_basis()
    model.add_adapter("ada", lorasb.LoRASBConfig(r=4, init="random"))
    with pytest.raises(ValueError, match="adapter 'ada' of the model has other A and B than 'default'"):
        load_adapters(model, tmp_path, NAMES)
