"""Adapters that share another's A and B: shared tensors, what is refused, adding, saving and loading many at once."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from basis_models import (
    NAMES,
    a_layer,
    answer,
    answers,
    base,
    fill,
    out,
    rewrite,
    saved,
    with_basis,
    with_users,
)
from models import batches_for, logits, patched
from peft import PeftModel
from tolerances import BF16_FEW, EXACT, MERGE, check, check_equal
from torch import nn

import lorasb
from lorasb.layers.adapter_state import Cores, FrozenFactors
from lorasb.layers.linear import LoRASBLinear
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis import load_adapters, save_adapters


def test_a_and_b_are_the_same_tensors_and_r_starts_at_zero_or_at_the_basis() -> None:
    model = with_basis()
    before = sum(p.numel() for p in model.parameters())
    model.add_adapter("zero", lorasb.LoRASBConfig(basis="default"))
    model.add_adapter("same", lorasb.LoRASBConfig(basis="default", basis_start="same"))
    for layer in layers_with(model, "zero").values():
        for name in ("zero", "same"):
            assert layer.lorasb_A[name] is layer.lorasb_A["default"]
            assert layer.lorasb_B[name] is layer.lorasb_B["default"]
        assert not layer.lorasb_R["zero"].any()
        assert torch.equal(layer.lorasb_R["same"], layer.lorasb_R["default"])
    r = [layer.r["default"] for layer in layers_with(model, "default").values()]
    assert sum(p.numel() for p in model.parameters()) == before + 2 * sum(rank**2 for rank in r)


def test_many_are_saved_at_once_as_peft_saves_each(tmp_path: Path) -> None:
    model = with_users("ada", "grace")
    model.save_pretrained(tmp_path / "peft")
    save_adapters(model, tmp_path / "ours", ["ada", "grace"])
    for name in ("ada", "grace"):
        theirs, ours = (tmp_path / kind / name for kind in ("peft", "ours"))
        assert {path.name for path in theirs.iterdir()} == {path.name for path in ours.iterdir()}
        for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            assert (theirs / file).read_bytes() == (ours / file).read_bytes()
    save_adapters(model, tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_the_basis_of_others_is_neither_deleted_nor_initialized(tmp_path: Path) -> None:
    model = with_users("u1", "u2", "u3", "u4")
    used = r"'default' is the basis of u1, u2, u3, \.\.\., whose .* delete those first"
    with pytest.raises(ValueError, match=used):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=used):
        lorasb.initialize(model, batches_for("llama"), adapter_name="default", lr=1e-3)
    with pytest.raises(ValueError, match="'u1' has the A and B of 'default', which new ones would replace"):
        lorasb.initialize(model, batches_for("llama"), adapter_name="u1", lr=1e-3)
    for name in ("u4", "u3", "u2", "u1", "default"):
        model.delete_adapter(name)


def test_what_cannot_be_is_refused() -> None:
    model = with_basis()
    for fields, message in (
        ({"basis": "nobody"}, "no layer has an adapter 'nobody': the model has default"),
        ({"basis": "default", "r": 3}, "has its rank, 4, got r=3"),
        ({"basis": "default", "basis_start": "one"}, "basis_start must be one of zero, same"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter("ada", lorasb.LoRASBConfig(**fields))
        assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"adapter 'default' has not been initialized .*adapter_name='default'"):
        lorasb.patch(base(), r=4).add_adapter("ada", lorasb.LoRASBConfig(basis="default"))


@pytest.mark.parametrize("change", ["double", "deepcopy"])
def test_sharing_outlives_casts_and_copies(change: str) -> None:
    model = with_users("ada")
    model = model.double() if change == "double" else copy.deepcopy(model)
    layer = a_layer(model)
    assert layer.lorasb_A["ada"] is layer.lorasb_A["default"]
    assert layer.lorasb_A["ada"].dtype == (torch.float64 if change == "double" else torch.float32)


def test_rows_in_training_need_one_basis_and_of_a_bank_no_checkpointing() -> None:
    model = with_users("ada")
    model.add_adapter("own", lorasb.LoRASBConfig(r=4, init="kaiming", init_seed=5))
    fill(model, "own", 9)
    model.train()
    with pytest.raises(ValueError, match=r"training mode\. Call model\.eval\(\), or train adapters on one basis"):
        model(**batches_for("llama")[0], adapter_names=["ada", "own"])
    assert torch.isfinite(model(**batches_for("llama")[0], adapter_names=["ada", "default"]).loss)
    lorasb.AdapterBank(model).add("emmy")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        model(**batches_for("llama")[0], adapter_names=["emmy", "default"])


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_a_sum_has_factors_of_its_own_and_leaves_the_basis(kind: str) -> None:
    model = with_users("ada", "grace")
    before = answers(model, "default", "ada", "grace")
    model.add_weighted_adapter(["ada", "grace"], [0.5, 0.7], "sum", combination_type=kind)
    assert "sum" not in a_layer(model).bases
    check_equal(answers(model, *before), before)


def test_a_basis_of_a_basis_is_found_by_its_root_and_merges_as_others_do(tmp_path: Path) -> None:
    model = with_users("ada")
    model.add_adapter("second", lorasb.LoRASBConfig(basis="ada", basis_start="same"))
    assert model.peft_config["second"].basis == "default"
    want = answer(model, "ada")
    check(answer(model, "second"), want, EXACT)
    model.merge_adapter()
    check(logits(model), want, MERGE)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    check(logits(PeftModel.from_pretrained(base(), tmp_path / "second").eval()), want, EXACT)


def test_the_scale_of_a_basis_is_its_own(tmp_path: Path) -> None:
    """An adapter on that basis has its configuration's scale, which its file stores."""
    model = saved(tmp_path / "as made", "ada")
    for layer in layers_with(model, "default").values():
        layer.set_scale("default", 2.0)
    lorasb.add_adapters(model, ["second"])
    load_adapters(model, tmp_path / "as made", ["ada"])
    for layer in layers_with(model, "default").values():
        layer.lorasb_R["second"].data.copy_(layer.lorasb_R["ada"])
    want = answer(model, "ada")
    check(answer(model, "second"), want, EXACT)
    model.save_pretrained(tmp_path / "scaled")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "scaled")
    loaded.load_adapter(tmp_path / "scaled" / "second", "second")
    check(answer(loaded, "second"), want, EXACT)


def state(model: PeftModel) -> dict[str, object]:
    """The layers' entire adapter state, the parameters with their flags, and the configs."""
    found: dict[str, object] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRASBLinear):
            states = {name: replace(state, preconditioner=None) for name, state in layer.adapters.items()}
            found[path] = states, set(layer.lorasb_R.stored_16bit), layer.active_adapters
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{path} parameter"] = (parameter.tolist(), parameter.requires_grad, parameter.dtype)
    return found | {f"{name} config": config.to_dict() for name, config in model.peft_config.items()}


@pytest.mark.parametrize("start", ["zero", "same"])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7, "wide_factors": True}], ids=str)
def test_they_are_what_peft_adds_one_by_one(start: str, options: dict[str, object]) -> None:
    one_by_one, at_once = with_basis(**options), with_basis(**options)
    for name in NAMES:
        one_by_one.add_adapter(name, lorasb.LoRASBConfig(basis="default", basis_start=start))
    lorasb.add_adapters(at_once, iter(NAMES), basis_start=start)
    assert state(at_once) == state(one_by_one)
    layer = a_layer(at_once)
    assert layer.lorasb_A["grace"] is layer.lorasb_A["default"]
    assert len({layer.lorasb_R[name].data_ptr() for name in ("default", *NAMES)}) == 4


def test_r_s_come_from_files_for_those_that_are_there_and_those_that_are_not(tmp_path: Path) -> None:
    source = saved(tmp_path, *NAMES)
    model = with_basis()
    lorasb.add_adapters(model, NAMES[:1])
    load_adapters(model, tmp_path, NAMES)
    for name in NAMES:
        for path, layer in layers_with(source, name).items():
            check(layers_with(model, name)[path].lorasb_R[name], layer.lorasb_R[name], EXACT)
    other = lorasb.patch(with_basis().unload(), r=4, init="random")
    with pytest.raises(ValueError, match="has other A and B"):
        load_adapters(other, tmp_path, NAMES)
    assert set(other.peft_config) == {"default"}
    taken = with_basis()
    taken.add_adapter("ada", lorasb.LoRASBConfig(r=4, init="random"))
    with pytest.raises(ValueError, match="adapter 'ada' of the model has other A and B than 'default'"):
        load_adapters(taken, tmp_path, NAMES)


def test_modules_of_their_own_are_made_by_peft() -> None:
    model = patched("roberta", task_type="SEQ_CLS")
    lorasb.add_adapters(model, ["one", "two"])
    assert any("modules_to_save.two" in name for name, _ in model.named_parameters())


def test_bad_names_leave_the_model_as_it_was() -> None:
    model = with_basis()
    before = state(model)
    for names, options, message in (
        ("ab", {}, "expected several names, got the text 'ab'"),
        (["ada", "default"], {}, "has an adapter 'default' already"),
        (["__base__"], {}, "expected a name without dots"),
        (["ada", "keys"], {}, "an attribute of ParameterDict, got 'keys'"),
        (["ada", "ada"], {}, "or it is named twice"),
        (["a.b"], {}, "expected a name without dots"),
        ([3], {}, "expected a name without dots for each adapter, .* got 3"),
        (["training"], {}, "an attribute of ParameterDict, got 'training'"),
        *(
            ([name], {}, f"adapter '{name}' has the name of a part of the model")
            for name in ("0", "q_proj", "lorasb_R")
        ),
        (["ada"], {"basis": "missing"}, "no layer has an adapter 'missing': the model has default"),
    ):
        with pytest.raises(ValueError, match=message):
            lorasb.add_adapters(model, names, **options)
        assert state(model) == before
    lorasb.AdapterBank(model).add("ada")
    with pytest.raises(ValueError, match="the model or its bank has an adapter 'ada' already"):
        lorasb.add_adapters(model, NAMES)


def test_of_none_nothing_and_of_hundreds_one_is_added_by_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_basis()
    before, add, calls = state(model), type(model).add_adapter, []
    lorasb.add_adapters(model, [])
    assert state(model) == before
    monkeypatch.setattr(type(model), "add_adapter", lambda *args: calls.append(args[1]) or add(*args))
    lorasb.add_adapters(model, [f"user-{i}" for i in range(200)])
    assert calls == ["user-0"]
    assert len(model.peft_config) == 201


@pytest.mark.parametrize(("kind", "at"), [(FrozenFactors, 0), (FrozenFactors, 1), (FrozenFactors, 5), (Cores, 0)])
def test_an_interrupt_in_the_middle_of_a_copy_leaves_nothing(
    kind: type[nn.ParameterDict], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_basis()
    before, count = state(model), iter(range(99))
    real = kind.__setattr__

    def fails(self: nn.ParameterDict, name: str, value: object) -> None:
        if name == "grace" and next(count) == at:
            raise KeyboardInterrupt
        real(self, name, value)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(kind, "__setattr__", fails)
        with pytest.raises(KeyboardInterrupt):
            lorasb.add_adapters(model, NAMES)
    assert state(model) == before
    lorasb.add_adapters(model, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, core: {key: None}, "was cut short"),
        (lambda key, core: {key: core[:1, :1]}, r"\[1, 1\]"),
        (lambda key, core: {key: torch.zeros(3, 3)}, r"\[3, 3\]"),
        (lambda key, core: {key: core * torch.nan}, "finite|NaN"),
    ],
    ids=["missing", "small", "other", "nan"],
)
def test_a_damaged_file_is_refused_and_the_model_stays(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path, *NAMES)
    rewrite(tmp_path / "grace", change)
    model = with_basis()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path, NAMES)
    assert state(model) == before


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_another_dtype_has_the_basis_still(
    dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    """A and B are cast with the base, and adapters on them are still recognized by the digest in their file."""
    saved(tmp_path, *NAMES)
    model = PeftModel.from_pretrained(base().to(dtype), tmp_path).eval()
    for name in NAMES:
        model.load_adapter(tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert a_layer(model).lorasb_A[name] is a_layer(model).lorasb_A["default"]
    wanted = {name: answer(model, name) for name in NAMES}
    served = PeftModel.from_pretrained(base().to(dtype), tmp_path).eval()
    bank = lorasb.AdapterBank(served)
    assert not bank.load(tmp_path).failed
    load_adapters(PeftModel.from_pretrained(base().to(dtype), tmp_path), tmp_path, NAMES)
    for name in NAMES:
        tolerances = BF16_FEW if dtype == torch.bfloat16 else MERGE
        check(out(served, name, name), wanted[name], tolerances)


def test_a_basis_that_was_changed_since_is_no_longer_that_of_its_file(tmp_path: Path) -> None:
    saved(tmp_path, "ada")
    model = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path)
    a_layer(model).lorasb_A["default"].data[0, 0] += 1.0
    with pytest.raises(
        ValueError, match="has other A and B than the basis, or the same in another dtype: load the base"
    ):
        load_adapters(model, tmp_path, ["ada"])
