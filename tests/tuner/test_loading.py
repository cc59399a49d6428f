"""Loading adapters: files of R alone, the basis by its digest, other A and B, damaged files, names that are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import unchanged
from basis_models import a_layer, answer, answers, base, fill, reconfigure, rewrite, saved, with_basis, with_users
from models import EXPERTS, causal, logits, make, patched
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tolerances import EXACT, MERGE, check, check_equal
from torch import Tensor

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving.basis import load_adapters
from lorasb.tuner.loading import refuse_missing_modules


def test_files_hold_r_and_the_digest_and_come_back_in_any_order(tmp_path: Path) -> None:
    model = saved(tmp_path, "ada", "grace")
    wanted = answers(model, "ada", "grace")
    own = load_file(str(tmp_path / "ada" / "adapter_model.safetensors"))
    cores = {key for key in own if "lorasb_R" in key}
    assert len(cores) == len(layers_with(model, "ada"))
    assert set(own) - cores == {"lorasb_factors_digest"}
    # basis loaded first: its tensors are shared
    again = PeftModel.from_pretrained(base(), tmp_path)
    for name in ("ada", "grace"):
        again.load_adapter(tmp_path / name, name)
        assert a_layer(again).lorasb_A[name] is a_layer(again).lorasb_A["default"]
        check(answer(again, name), wanted[name], EXACT)
    # an adapter loaded first finds its basis in the parent folder, and the next one shares it in the model
    alone = PeftModel.from_pretrained(base(), tmp_path / "grace", adapter_name="first")
    alone.load_adapter(tmp_path / "ada", "second")
    assert a_layer(alone, "first").lorasb_A["second"] is a_layer(alone, "first").lorasb_A["first"]
    check(answer(alone, "second"), wanted["ada"], EXACT)
    check(answer(alone, "first"), wanted["grace"], EXACT)
    alone.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(base(), tmp_path / "again" / "first")
    check(logits(third.eval()), wanted["grace"], EXACT)


def test_auto_model_and_a_sibling_folder(tmp_path: Path) -> None:
    model = saved(tmp_path / "all", "ada")
    base().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "all" / "ada", tmp_path / "apart" / "ada")
    shutil.copytree(tmp_path / "all", tmp_path / "apart" / "default", ignore=shutil.ignore_patterns("ada"))
    reconfigure(tmp_path / "apart" / "ada", base_model_name_or_path=str(tmp_path / "base"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "apart" / "ada")
    check(logits(again.eval()), answer(model, "ada"), EXACT)


def test_another_basis_is_refused_and_the_model_stays(tmp_path: Path) -> None:
    saved(tmp_path, "ada")
    shutil.copytree(tmp_path / "ada", tmp_path / "alone" / "ada")
    model = with_basis(init_seed=7)
    message = r"'ada' holds R alone, and was trained on a basis 'default' that neither"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "alone" / "ada", "ada")


FIELDS = {"scaling": 3.0}, {"init": "lora-xs", "lora_alpha": 32}, {"wide_factors": True}, {"target_parameters": EXPERTS}


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_an_adapter_alone_has_the_settings_of_its_basis(fields: dict[str, object], tmp_path: Path) -> None:
    family = "qwen3_moe" if "target_parameters" in fields else "llama"
    model = lorasb.patch(make(family), **{"r": 4, "init": "kaiming"} | fields)
    model.add_adapter("ada", lorasb.LoRASBConfig(basis="default"))
    fill(model, "ada", 1)
    model.save_pretrained(tmp_path)
    model.set_adapter("ada")
    alone = PeftModel.from_pretrained(make(family), tmp_path / "ada")
    check(logits(alone.eval(), family), logits(model.eval(), family), EXACT)


def test_loading_beside_another_adapter_of_the_basis_s_name_leaves_that_one(tmp_path: Path) -> None:
    want = answer(saved(tmp_path, "ada"), "ada")
    for rank in (4, 2):
        model = with_basis(init="random", r=rank)
        fill(model, "default", 7)
        before = answer(model, "default")
        model.load_adapter(tmp_path / "ada", "ada")
        check(answer(model, "default"), before, EXACT)
        check(answer(model, "ada"), want, EXACT)
        assert not a_layer(model).bases


def test_a_file_with_other_factors_does_not_overwrite_shared_ones(tmp_path: Path) -> None:
    other = with_basis(init_seed=9)
    fill(other, "default", 8)
    other.save_pretrained(tmp_path)
    want = answer(other, "default")
    model = with_users("ada", "grace")
    before = answers(model, "default", "grace")
    with pytest.raises(ValueError, match="'default' is the basis of ada, grace, whose R would mean nothing"):
        model.load_adapter(tmp_path, "default")
    check_equal(answers(model, *before), before)
    model.load_adapter(tmp_path, "ada")  # `ada` leaves the basis
    check(answer(model, "ada"), want, EXACT)
    assert "ada" not in a_layer(model).bases
    check_equal(answers(model, *before), before)


@pytest.mark.parametrize("owner", ["own", "ada"])
def test_a_damaged_file_moves_no_adapter_onto_a_basis_or_off_it(owner: str, tmp_path: Path) -> None:
    """`own` has its own A and B but loads a file on the basis; `ada` is on the basis but loads a file that is not."""
    saved(tmp_path, "grace")
    model = with_users("ada")
    model.add_adapter("own", lorasb.LoRASBConfig(r=4, init="kaiming", init_seed=5))
    fill(model, "own", 6)
    if owner == "ada":
        with_basis(init_seed=9).save_pretrained(tmp_path / "grace")
    rewrite(tmp_path / "grace", lambda key, core: {key: torch.full_like(core, float("nan"))})
    with unchanged(model), pytest.raises(ValueError, match="has NaN or Inf values"):
        model.load_adapter(tmp_path / "grace", owner)


def test_hotswapping_an_adapter_on_a_basis_copies_its_factors(tmp_path: Path) -> None:
    model = saved(tmp_path, "ada")
    want = answer(model, "ada")
    model.add_adapter("own", lorasb.LoRASBConfig(r=4, init="kaiming", init_seed=5))
    parameter = a_layer(model).lorasb_A["own"]
    hotswap_adapter(model, str(tmp_path / "ada"), "own")
    check(answer(model, "own"), want, EXACT)
    assert a_layer(model).lorasb_A["own"] is parameter
    assert "own" not in a_layer(model).bases
    with pytest.raises(ValueError, match="'default' is the basis of ada"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_on_a_cast_basis_adapters_and_the_basis_load_again(tmp_path: Path) -> None:
    """Also after a refused load, and with hotswapping."""
    saved(tmp_path / "all", "ada")
    other = with_basis(init_seed=7)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "all" / "ada", tmp_path / "alone" / "ada")
    model = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path / "all").eval()
    for _ in range(2):
        model.load_adapter(tmp_path / "alone" / "ada", "ada")
        assert a_layer(model).lorasb_A["ada"] is a_layer(model).lorasb_A["default"]
    model.load_adapter(tmp_path / "all", "default")
    with pytest.raises(ValueError, match="whose R would mean nothing without its A and B"):
        model.load_adapter(tmp_path / "other", "default")
    load_adapters(model, tmp_path / "all", ["ada"])
    with pytest.raises(ValueError, match="no layer has an adapter 'nobody'"):
        load_adapters(model, tmp_path / "all", ["ada"], basis="nobody")
    model.save_pretrained(tmp_path / "cast")  # in bf16, with the adapter on it
    again = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path / "cast").eval()
    again.load_adapter(tmp_path / "cast" / "ada", "ada")
    swapped = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path / "other").eval()
    hotswap_adapter(swapped, str(tmp_path / "all"), "default")
    assert not lorasb.AdapterBank(swapped).load(tmp_path / "all" / "ada").failed


@pytest.mark.parametrize("digest", [torch.zeros(32), torch.zeros(3, dtype=torch.uint8)])
def test_a_damaged_digest_leaves_no_adapter(digest: torch.Tensor, tmp_path: Path) -> None:
    saved(tmp_path, "ada")
    rewrite(tmp_path / "ada", lambda *_: {"lorasb_factors_digest": digest})
    model = with_basis()
    with pytest.raises(ValueError, match="expected lorasb_factors_digest of 32 bytes, got"):
        model.load_adapter(tmp_path / "ada", "ada")
    assert "ada" not in a_layer(model).lorasb_R


def test_a_name_that_would_empty_other_files_is_refused_there_too(tmp_path: Path) -> None:
    """PEFT would leave out every key with `.0.`, even where 0 is a layer's number."""
    model = with_basis()
    model.add_adapter("0", lorasb.LoRASBConfig(basis="default"))
    with pytest.raises(ValueError, match="take another name, such as 'u0'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["v1.0", "keys"])
def test_a_refused_name_leaves_layers_that_merge(name: str) -> None:
    model = with_basis()
    fill(model, "default", 1)
    before = logits(model, "llama")
    with pytest.raises(ValueError, match="expected a name without dots"):
        model.add_adapter(name, lorasb.LoRASBConfig(r=2, init="random"))
    model.merge_adapter()
    model.unmerge_adapter()
    check(logits(model, "llama"), before, MERGE)
    model.to(torch.bfloat16)


def test_another_adapters_head_is_no_target(tmp_path: Path) -> None:
    model = lorasb.patch(causal("Llama"), r=4, init="random", modules_to_save=["lm_head"])
    model.add_adapter("other", lorasb.LoRASBConfig(r=4, init="random"))
    assert not any("lm_head" in name for name in layers_with(model, "other"))
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "kept", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "", r"modules_to_save 'lm_head': expected its weights"),
        ({"modules_to_save": ["mlp"]}, "up_proj", r"expected model.layers.[01].mlp.(gate|down)_proj.weight in"),
        ({"modules_to_save": ["mlp"]}, "mlp", ""),
        ({"modules_to_save": ["no such module"]}, "", ""),
        ({"trainable_token_indices": [3]}, "mlp", "trainable_token_indices: expected their rows"),
        ({"trainable_token_indices": [3]}, "embed", ""),
        ({}, "", ""),
    ],
)
def test_modules_that_the_configuration_lists_are_in_the_file(
    fields: dict[str, object], kept: str, message: str
) -> None:
    model, config = make("llama"), lorasb.LoRASBConfig(**fields)
    refuse_missing_modules(model, config)  # of no file
    keys = [key for key in model.state_dict() if kept and kept in key]
    config.saved_names = tuple(f"base_model.model.{key.replace('embed', 'trainable_tokens')}" for key in keys)
    if not message:
        return refuse_missing_modules(model, config)
    with pytest.raises(ValueError, match=message):
        refuse_missing_modules(model, config)
    return None


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
UNUSABLE: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "NaN or Inf": lambda tensors: tensors | {f"{FIRST}.lorasb_R": torch.full((4, 4), torch.nan)},
    "no lorasb_R": lambda tensors: {key: value for key, value in tensors.items() if key != f"{FIRST}.lorasb_R"},
    "ignore_mismatched_sizes": lambda tensors: tensors | {f"{FIRST}.lorasb_R": torch.ones(3, 3)},
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT's, at the second adapter
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("message", UNUSABLE)
def test_a_failed_load_by_transformers_leaves_the_model_as_it_was(tmp_path: Path, message: str, other: bool) -> None:
    patched().save_pretrained(tmp_path)
    model, file = make("llama"), tmp_path / "adapter_model.safetensors"
    if other:
        model.load_adapter(str(tmp_path), "other")
    tensors = load_file(file)
    save_file(UNUSABLE[message](tensors), file)
    with unchanged(model), pytest.raises((ValueError, RuntimeError), match=message):
        model.load_adapter(str(tmp_path))
    save_file(tensors, file)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(make("llama"), tmp_path)))


def test_a_failed_load_leaves_an_adapter_that_was_added_before(tmp_path: Path) -> None:
    patched().save_pretrained(str(tmp_path / "saved"))
    config = lorasb.LoRASBConfig.from_pretrained(str(tmp_path / "saved"))
    model = get_peft_model(make("llama"), config)
    with pytest.raises(ValueError, match=r"typo"):
        model.load_adapter(str(tmp_path / "typo"), "default")
    model.load_adapter(str(tmp_path / "saved"), "default")
    assert all(layer.is_initialized("default") for layer in layers_with(model, "default").values())
