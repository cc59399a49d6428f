"""Saving and loading are exact, checked and atomic, need the adapter's own base model, and include a model card."""

import copy
import json
import os
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from adapters import layers, unchanged
from basis_models import reconfigure
from huggingface_hub import ModelCard, ModelCardData
from models import batches_for, causal, logits, make, patched
from safetensors.torch import load_file, save_file
from tolerances import check_equal
from torch import Tensor, nn

import lorasb
from lorasb.checkpoints.adapter_file import fingerprint, group_by_layer, read_config, read_tensors
from lorasb.checkpoints.model_card import ORIGIN_NAME, add_usage, update_card
from lorasb.constants import CONFIG_NAME, WEIGHTS_NAME
from lorasb.utils.atomic_files import replacing_folder, write_json

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    patched().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of a saved adapter that a test may damage."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)


def check_refused(folder: Path, message: str, seed: int = 0) -> None:
    """Assert that an adapter is not loaded and that the base is unchanged."""
    base = make("llama", seed)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, folder)
    assert not layers(base)
    assert not hasattr(base, "peft_config")
    check_equal(dict(base.state_dict()), dict(make("llama", seed).state_dict()))


@pytest.mark.parametrize("ranks", [{"k_proj": 2}, {"q_proj": 8, ".*": 4}], ids=str)  # the order of patterns matters
@pytest.mark.parametrize(("dtype", "low_cpu_mem_usage"), [(torch.float32, False), (torch.bfloat16, True)])
def test_reload_is_exact(tmp_path: Path, dtype: torch.dtype, low_cpu_mem_usage: bool, ranks: dict[str, int]) -> None:
    model = patched(dtype=dtype, rank_pattern=ranks, scaling=0.5)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    check_equal(*(dict(peft.get_peft_model_state_dict(one)) for one in (again, model)))


@pytest.mark.parametrize(("trainable", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_transformers_load_adapter_is_exact(trainable: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    want, model = patched(dtype=dtype), make("llama", dtype=dtype)
    want.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), is_trainable=trainable)
    assert torch.equal(logits(model), logits(want))
    cores = {n: p for n, p in model.named_parameters() if "lorasb_R" in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == (cores.keys() if trainable else set())
    assert {p.dtype for p in cores.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in cores} == {dtype}
    if trainable:
        model.train()(**batches_for("llama")[0]).loss.backward()
        assert all(p.grad is not None for p in cores.values())


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_file_holds_the_factors_and_nothing_else(saved: Path) -> None:
    tensors, config = load_file(saved / WEIGHTS_NAME), json.loads((saved / CONFIG_NAME).read_text())
    found = group_by_layer(tensors)
    assert (len(found), len(tensors)) == (14, 3 * 14)
    assert all(set(parts) == {"lorasb_A", "lorasb_R", "lorasb_B"} for parts in found.values())
    assert (config["peft_type"], config["r"], config["init_provenance"]["num_samples"]) == ("LORASB", 4, 6)


def test_an_uninitialized_adapter_is_saved_with_a_warning_and_loaded_as_one(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    with pytest.warns(UserWarning, match=r"'default' has not been initialized .*lorasb\.initialize.*selected_adapters"):
        tensors = peft.get_peft_model_state_dict(model)
    assert len(tensors) == 3 * 14
    with pytest.warns(UserWarning, match="or after loading it"):
        model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    with pytest.raises(RuntimeError, match="has not been initialized: its A, B and R are zero"):
        again.train()(**batches_for("llama")[0])
    lorasb.initialize(again, batches_for("llama"), lr=1e-2, progress=False)
    again.train()(**batches_for("llama")[0]).loss.backward()


PREFIX = "base_model.model."
A, R, B = (f"{PREFIX}model.layers.1.mlp.up_proj.lorasb_{part}" for part in "ARB")


def without_r(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key != R}


def plain_lora(tensors: Tensors) -> Tensors:
    parts = {"lora_A": (4, 64), "lora_B": (64, 4)}
    names = group_by_layer(tensors)
    return {f"{PREFIX}{name}.{part}.weight": torch.zeros(size) for name in names for part, size in parts.items()}


IGNORED = r"the adapter file has '.*' and 41 more, expected factors"
UNNAMED = r"the adapter file has 'base_model.*expected factors of adapted layers"
LAYER = "model.layers.0.self_attn.q_proj.base_layer"
FOREIGN = {  # PEFT would load these into the base, where `disable_adapter()` does not undo it
    "model.norm.weight": (64,),
    f"{LAYER}.weight": (64, 64),
    "model.warp": (4,),
}
DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "R in 16 bits": (lambda t: t | {R: t[R].bfloat16()}, r"lorasb_R of layer .* is torch\.bfloat16 in the adapter file, expected one of torch\.float32"),
    "NaN": (lambda t: t | {B: t[B].index_fill(0, torch.tensor([0]), float("nan"))}, r"lorasb_B of layer .* has NaN or Inf values in the adapter file"),
    "missing": (without_r, r"has no lorasb_R for layer 'model\.layers\.1\.mlp\.up_proj'.*holds 14 layers, this model has 14"),
    "shape": (lambda t: t | {R: torch.zeros(5, 5)}, r"lorasb_R of layer 'model\.layers\.1\.mlp\.up_proj' is \[5, 5\] in the adapter file, expected \[4, 4\]"),
    "dtype": (lambda t: t | {A: torch.zeros(4, 64, dtype=torch.int32)}, r"lorasb_A of layer .* is torch\.int32 in the adapter file, expected one of"),
    "extra": (lambda t: t | {key.replace("layers.1", "layers.7"): torch.zeros(4, 4) for key in (A, R, B)}, r"has layers that this model does not adapt: model\.layers\.7\.mlp\.up_proj"),
    "two keys": (lambda t: t | {R.removeprefix(PREFIX): 2 * t[R]}, "expected one lorasb_R for layer '.*', got a second one as"),
    "mislabeled": (plain_lora, r"holds a plain LoRA .* its configuration says LORASB: it has no R"),
    # PEFT would silently ignore these and leave the base without an adapter
    "without the prefix": (lambda t: {key.removeprefix(PREFIX): value for key, value in t.items()}, IGNORED),
    "another adapter's": (lambda t: {f"{key}.other": value for key, value in t.items()}, IGNORED),
    **{name: (lambda t, name=name: t | {PREFIX + name: torch.full(FOREIGN[name], 3.0)}, UNNAMED) for name in FOREIGN},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_says_what_is_wrong_and_leaves_the_base_as_it_was(saved: Path, name: str) -> None:
    change, message = DAMAGE[name]
    edit(saved, change)
    check_refused(saved, message)


HEAD = f"{PREFIX}classifier.dense"
DAMAGED_HEADS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "shape": (lambda t: t | {f"{HEAD}.weight": torch.zeros(3, 64)}, r"classifier.dense.weight is \[3, 64\] in the adapter file, expected \[64, 64\]: load the base model with as many labels"),
    "NaN": (lambda t: t | {f"{HEAD}.bias": torch.full((64,), float("nan"))}, r"classifier\.dense\.bias has NaN or Inf values"),
    "missing": (lambda t: {key: value for key, value in t.items() if key != f"{HEAD}.bias"}, r"expected classifier\.dense\.bias in the adapter file, got none"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_HEADS)
def test_a_damaged_head_is_refused_and_leaves_the_base_as_it_was(tmp_path: Path, name: str) -> None:
    change, message = DAMAGED_HEADS[name]
    patched("roberta").save_pretrained(tmp_path)
    edit(tmp_path, change)
    base = make("roberta")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
    check_equal(dict(base.state_dict()), dict(make("roberta").state_dict()))


@pytest.mark.parametrize("adapter", ["default", "second"])
@pytest.mark.parametrize("by_config", [False, True])
def test_a_failed_load_leaves_a_trained_adapter_and_can_be_repeated(saved: Path, adapter: str, by_config: bool) -> None:
    whole = (saved / WEIGHTS_NAME).read_bytes()
    edit(saved, without_r)
    model = patched()
    if by_config:  # from the configuration alone, without loading tensors
        model = peft.get_peft_model(make("llama"), peft.PeftConfig.from_pretrained(saved))
        model.set_adapter("default")  # saved configurations are in inference mode
        lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    want = logits(model)
    with unchanged(model), pytest.raises(ValueError, match="has no lorasb_R"):
        model.load_adapter(saved, adapter)
    (saved / WEIGHTS_NAME).write_bytes(whole)
    model.load_adapter(saved, adapter)
    model.set_adapter(adapter)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        patched().save_pretrained(tmp_path / "saved")
        with replacing_folder(tmp_path / "folder") as folder:
            write_json(folder / "x.json", {})
    finally:
        os.umask(before)
    files = [*(tmp_path / "saved").iterdir(), tmp_path / "folder" / "x.json"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}
    assert oct((tmp_path / "folder").stat().st_mode & 0o777) == oct(0o777 & ~umask)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_and_the_base_stays(saved: Path, share: float) -> None:
    whole = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(whole[: int(len(whole) * share)])
    check_refused(saved, r"is truncated or damaged: its header promises|is not a safetensors file")


def test_a_config_of_the_future_is_read_with_a_warning_and_those_that_cannot_be_say_why(saved: Path) -> None:
    reconfigure(saved, warp=9)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['warp'\]"):
        assert lorasb.LoRASBConfig.from_pretrained(str(saved)).r == 4
    with pytest.raises(ValueError, match=r"expected an adapter folder with adapter_config\.json"):
        read_config(saved / "nothing")
    reconfigure(saved, peft_type="LORA")
    with pytest.raises(ValueError, match="holds an adapter of type 'LORA', expected 'LORASB'"):
        read_config(saved)
    (saved / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match="this is not valid JSON"):
        read_config(saved)


def test_a_save_killed_half_way_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    """Save repeatedly in forks, kill them after various pauses, and check what is on disk."""
    model = patched(r=16)
    model.save_pretrained(tmp_path)
    for pause in (0.0, 0.013, 0.031, 0.077):
        child = os.fork()
        if child == 0:
            save_until_killed(model, tmp_path)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert len(group_by_layer(read_tensors(tmp_path))) == 14
        assert layers(peft.PeftModel.from_pretrained(make("llama"), tmp_path))


def save_until_killed(model: peft.PeftModel, folder: Path) -> None:
    """Change and save an adapter repeatedly until this process is killed."""
    try:
        while True:
            for layer in layers(model).values():
                layer.lorasb_R["default"].data.add_(1.0)
            model.save_pretrained(folder)
    finally:
        os._exit(1)


def test_embeddings_that_peft_saved_beside_the_adapter_are_left_out(saved: Path) -> None:
    """PEFT adds them if a target is an embedding; they are harmless while they equal the base's."""
    base, key = make("llama"), "base_model.model.model.embed_tokens.weight"
    own = base.get_input_embeddings().weight.detach().clone()
    edit(saved, lambda tensors: tensors | {key: own.bfloat16()})
    loaded = peft.PeftModel.from_pretrained(make("llama", dtype=torch.bfloat16).float(), saved)
    assert torch.equal(loaded.get_input_embeddings().weight, own.bfloat16().float())
    edit(saved, lambda tensors: tensors | {key: own})
    assert torch.equal(peft.PeftModel.from_pretrained(base, saved).get_input_embeddings().weight, own)


STALLS = "(.*.*)*zzz(a+)+$"
FIELDS: list[tuple[str, Any, str]] = [
    ("modules_to_save", ["lm_head"], "expected its weights in the adapter file, got none"),  # the file lacks them
    ("trainable_token_indices", [3], "expected their rows in the adapter file, got none"),
    ("target_modules", STALLS, "target_modules: expected no repeated group"),
    ("exclude_modules", STALLS, "exclude_modules: expected no repeated group"),
    ("rank_pattern", {STALLS: 4}, "rank_pattern: expected no repeated group"),
    ("modules_to_save", [STALLS], "modules_to_save: expected no repeated group"),
]


@pytest.mark.parametrize(("field", "value", "message"), FIELDS)
def test_fields_that_do_not_fit_the_file_or_stall_a_load(saved: Path, field: str, value: Any, message: str) -> None:
    reconfigure(saved, **{field: value})
    started = time.perf_counter()
    check_refused(saved, message)
    assert time.perf_counter() - started < 5


def resized(folder: Path) -> Any:
    """A base whose vocabulary was resized; PEFT compares it with the saved one."""
    if not folder.exists():
        make("llama").save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    base.resize_token_embeddings(120)
    return base


EMBEDDINGS = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings")
IN_THE_FILE = pytest.mark.filterwarnings("ignore:.*is in the adapter file")


@EMBEDDINGS
@IN_THE_FILE
@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_a_resized_vocabulary_in_modules_to_save_is_loaded(tmp_path: Path, modules: list[str]) -> None:
    """PEFT also writes copies of these modules under other names."""
    base = resized(tmp_path / "base")
    model = lorasb.patch(base, r=4, target_modules=["q_proj"], init="kaiming", modules_to_save=modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 1.0
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)  # as a resuming Trainer does


def test_weights_that_cannot_be_read_have_no_fingerprint() -> None:
    assert fingerprint({"a": torch.ones(2), "b": torch.ones(2)}) is not None
    assert fingerprint({"a": torch.ones(2), "b": torch.empty(2, device="meta")}) is None


@EMBEDDINGS
def test_a_resized_vocabulary_that_nothing_names_is_reported_at_the_save(tmp_path: Path) -> None:
    model = lorasb.patch(resized(tmp_path / "base"), r=4, target_modules=["q_proj"], init="kaiming")
    with pytest.warns(UserWarning, match="is in the adapter file, as the vocabulary was resized"):
        model.save_pretrained(tmp_path / "adapter")


@EMBEDDINGS
@IN_THE_FILE
def test_an_adapted_embedding_loads_on_a_base_in_another_precision(tmp_path: Path) -> None:
    """PEFT adds the base's embedding to the file; rounded to another dtype, it still counts as the base's."""
    model = lorasb.patch(make("llama", dtype=torch.float16), r=4, target_modules=["embed_tokens"], init="kaiming")
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(make("llama", dtype=torch.bfloat16), tmp_path)


def test_an_adapted_embedding_is_saved_without_what_is_merged(tmp_path: Path) -> None:
    base = causal("Llama", tie_word_embeddings=False).eval()
    model = lorasb.patch(copy.deepcopy(base), r=4, init="kaiming", target_modules=["embed_tokens"])
    want = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    check_equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), want)


@pytest.mark.parametrize("targets", [["one"], ["zero", "one", "two"], ["one", "two"]])
def test_the_parts_of_attention_are_not_looked_for_in_a_base(targets: list[str], tmp_path: Path) -> None:
    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        parts = {"zero": nn.Linear(8, 8), "one": nn.MultiheadAttention(8, 2), "two": nn.Linear(8, 8)}
        return nn.Sequential(OrderedDict(parts))

    lorasb.patch(base(0), r=2, init="kaiming", target_modules=targets).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(base(0), tmp_path)
    if targets[-1] != "one":  # attention's weights have other names in the base, and are not compared
        with pytest.raises(ValueError, match="another base model"):
            peft.PeftModel.from_pretrained(base(1), tmp_path)


def test_the_adapter_of_another_base_is_refused_unless_it_is_meant(saved: Path) -> None:
    check_refused(saved, r"this base is another one: 16 of 16 sampled weights of .*folder, check_base=False\)", seed=1)
    with pytest.raises(ValueError, match="this base is another one"):
        make("llama", seed=1).load_adapter(str(saved))
    config = lorasb.LoRASBConfig.from_pretrained(str(saved), check_base=False)
    for number, options in enumerate(({"check_base": False}, {"config": config})):
        base, again = make("llama", seed=1), saved.parent / f"again-{number}"
        meant = peft.PeftModel.from_pretrained(base, saved, **options)
        meant.save_pretrained(again)
        want = logits(meant)
        values = json.loads((again / CONFIG_NAME).read_text())
        assert values["base_fingerprint"] is None
        assert not {"check_base", "init_seed"} & set(values)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(make("llama", seed=1), again)), want)


@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-llama")
def test_the_card_says_where_the_adapter_comes_from_and_how_to_use_it(tmp_path: Path) -> None:
    model = patched()
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.peft_config["default"].init_provenance["data"] = "six sentences"
    for _ in range(2):  # saving again replaces the section
        model.save_pretrained(tmp_path)
    add_usage(tmp_path, "```\nlorasb ask here\n```")
    card = (tmp_path / "README.md").read_text()
    facts = model.peft_config["default"].init_provenance
    said = ("tiny-llama", "six sentences", "| seed | 0 |", "| η of the simulated step | 0.02 |", "| init samples | 6 |")
    for value in (*said, facts["data_sha256"], f"torch {torch.__version__}", f"lorasb {lorasb.__version__}"):
        assert value in card
    assert card.count("# A LoRA-SB adapter") == 1
    assert card.startswith("---\n")
    assert "\n- lora-sb\n" in card.partition("\n---\n")[0]  # a tag, in the front matter
    section = card.partition("<!-- lorasb: start -->")[2].partition("<!-- lorasb: end -->")[0]
    assert section.strip().splitlines()[2].startswith("**`import lorasb` first**")
    assert "lorasb ask here" in section


def test_the_card_of_a_baseline_says_so(tmp_path: Path) -> None:
    lorasb.patch(make("roberta"), r=4, init="lora-xs").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "LoRA-XS" in card
    assert "| scaling s | 4 |" in card
    assert "also trained, and saved whole | classifier" in card
    assert "More Information Needed" not in card


def test_a_card_that_was_filled_in_keeps_its_text(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path)
    form = ModelCard.from_template(ModelCardData()).text
    (tmp_path / "README.md").write_text(form.replace("[More Information Needed]", "Not for billing.", 1))
    patched().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Not for billing." in card
    assert card.count("# A LoRA-SB adapter") == 1


BROKEN = ["---\n: [\n---\n# mine\n", "---\ntags: 3\n---\n# mine\n", "---\nnever closed\n# mine\n", "# mine\n", ""]
ODD = ["---\ntitle: mine\n---", "\n---\ntitle: mine\n---\n# mine", "--- \ntitle: mine\n---\t\n# mine"]


@pytest.mark.parametrize("card", BROKEN + ODD)
def test_a_card_with_broken_or_odd_front_matter_is_repaired_and_keeps_its_text(tmp_path: Path, card: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(card)
    for _ in range(2):
        update_card(tmp_path, {"r": 4}, 1.0)
    text = file.read_text()
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert "lora-sb" in front["tags"]
    assert front.get("title") == ("mine" if card in ODD else None)
    assert next(iter(front)) == ("title" if card in ODD else "tags")  # in the user's order
    assert text.count("title") == (card in ODD)
    assert text.count("# A LoRA-SB adapter") == 1
    assert ("# mine" in text) == ("# mine" in card)


def test_the_card_names_the_hub_s_model_and_not_the_folder_of_its_conversion(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    base.mkdir()
    write_json(base / ORIGIN_NAME, {"hub_id": "them/model", "converted_from": "model.Q4_1.gguf"})
    model = patched()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(base) not in text
    assert "| base model | them/model, dequantized from model.Q4_1.gguf |" in text


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no factors": (lambda tensors: {"w": torch.ones(1)}, r"holds no LoRA-SB factors \(lorasb_A, lorasb_R, lorasb_B\)"),
    "no R": (
        lambda tensors: {key: value for key, value in tensors.items() if key != f"{FIRST}.lorasb_R"},
        r"'model.layers.0.self_attn.q_proj' has lorasb_A, lorasb_B in .*, expected lorasb_A, lorasb_R, lorasb_B",
    ),
    "another rank": (lambda tensors: tensors | {f"{FIRST}.lorasb_A": torch.ones(3, 64)}, r"safetensors: .*lorasb_A"),
    "a scalar": (lambda tensors: tensors | {f"{FIRST}.lorasb_R": torch.tensor(1.0)}, r"safetensors: .*lorasb_"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_without_a_layers_three_factors_are_not_read(saved: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    assert len(read_tensors(saved)) == 3 * 14
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        read_tensors(saved)
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors in .*, found none"):
        read_tensors(saved)
