"""The plain-LoRA export: stock PEFT computes the same; experts have vLLM's names; R is sent after every step."""

import errno
import itertools
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tolerances
import torch
import transformers
from adapters import layers
from basis_models import base, with_users
from huggingface_hub import ModelCard
from models import EXPERTS, batches_for, causal, llama, logits, make, patched
from networks import Net
from safetensors.torch import load_file
from torch import nn

import lorasb
from lorasb.app import cli
from lorasb.export.lora import serve_command


def exported(source: torch.nn.Module | Path, folder: Path, **options: str) -> dict[str, torch.Tensor]:
    """Export, and return the file's tensors."""
    lorasb.export_lora(source, folder, quiet=True, **options)
    return load_file(folder / "adapter_model.safetensors")


def test_stock_peft_computes_the_same(tmp_path: Path) -> None:
    """With two ranks, a scaling and transposed weights."""
    model = patched("gpt2", rank_pattern={"c_proj": 2}, scaling=0.5)
    lorasb.export_lora(model, tmp_path, quiet=True)
    stock = peft.PeftModel.from_pretrained(make("gpt2"), tmp_path).eval()
    assert type(stock.base_model) is peft.LoraModel
    assert (logits(model, "gpt2") - logits(make("gpt2"), "gpt2")).abs().max() > 1e-3
    tolerances.check(logits(stock, "gpt2"), logits(model, "gpt2"), tolerances.EXPORT)


def test_folder_and_model_give_the_same_export(tmp_path: Path) -> None:
    model = patched(init="update", scaling=2.0)
    model.save_pretrained(tmp_path / "adapter")
    tolerances.check_equal(exported(model, tmp_path / "one"), exported(tmp_path / "adapter", tmp_path / "two"))


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(patched(r=4), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def failing(path: Path, *args: object, **options: object) -> int:
        if ".README.md." in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match=r"README\.md cannot be written: No space"):
        exported(patched(r=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_rank_padded_with_zeros(tmp_path: Path) -> None:
    tensors = exported(patched(r=4, rank_pattern={"k_proj": 2}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {4}
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    assert tensors[key][:2].any()
    assert not tensors[key][2:].any()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_the_serving_command_has_a_rank_that_vllm_takes() -> None:
    for rank, shown in {1: 1, 4: 8, 16: 16, 17: 32, 64: 64, 96: 128, 256: 256, 300: 320}.items():
        command = serve_command("base", Path("lora"), rank)
        assert command == f"vllm serve base --enable-lora --max-lora-rank {shown} --lora-modules adapter=lora"


def test_the_command_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lorasb.export_lora(patched(r=4), tmp_path)
    assert "--max-lora-rank 8" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.tags == ["lora"]
    assert "--max-lora-rank 8 --lora-modules adapter=THIS_FOLDER" in card  # the folder may be moved


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call model = lorasb\.patch\(model\) first"):
        lorasb.export_lora(make("llama"), tmp_path / "a")
    with pytest.raises(ValueError, match="has not been initialized"):
        lorasb.export_lora(lorasb.patch(make("llama"), r=4), tmp_path / "a")
    with pytest.warns(UserWarning, match="has not been initialized"):
        lorasb.patch(make("llama"), r=4).save_pretrained(tmp_path / "fresh")
    with pytest.raises(ValueError, match="was saved before it was initialized"):
        lorasb.export_lora(tmp_path / "fresh", tmp_path / "a")
    for options in ({"padding_mode": "circular", "padding": 1}, {"dilation": 2}):
        net = nn.Sequential(OrderedDict(one=nn.Conv2d(3, 8, 3, **options)))
        with pytest.raises(
            ValueError, match="'one' is a convolution in groups, dilated or padded by others than zeros"
        ):
            lorasb.export_lora(lorasb.patch(net, r=2, target_modules=["one"], init="kaiming"), tmp_path / "a")
    with pytest.raises(ValueError, match="no layer has an adapter 'other'"):
        lorasb.export_lora(patched(), tmp_path / "a", adapter_name="other")
    model = patched()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.lorasb_R["default"].fill_(1e30)
    message = r"layer 'model\.layers\.0\.mlp\.up_proj' has values that are not finite in torch\.float16"
    with pytest.raises(ValueError, match=message):
        lorasb.export_lora(model, tmp_path / "a", dtype=torch.float16)
    assert not (tmp_path / "a").exists()


def test_an_export_never_takes_an_adapters_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"README\.md is not an export's, and would be replaced: name another folder"):
        lorasb.export_lora(patched(), tmp_path, quiet=True)
    for _ in range(2):  # files of another export may be replaced
        lorasb.export_lora(patched(), tmp_path / "lora", quiet=True)
    (tmp_path / "lora" / "README.md").unlink()  # as of a LoRA that PEFT trained
    with pytest.raises(ValueError, match=r"adapter_config\.json is not an export's, and would be replaced"):
        lorasb.export_lora(patched(), tmp_path / "lora", quiet=True)
    patched().save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="has a LoRA-SB adapter, which the plain LoRA would replace: name another"):
        lorasb.export_lora(folder, folder, quiet=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lorasb", "export", "."])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert (tmp_path / "adapter-lora" / "adapter_model.safetensors").is_file()


def test_a_compiled_model_is_exported_under_its_own_names(tmp_path: Path) -> None:
    model = patched()
    plain = exported(model, tmp_path / "plain")
    assert plain.keys() == exported(torch.compile(model), tmp_path / "compiled").keys()


# vllm/lora/utils.py, process_packed_modules_mapping: packed_modules_mapping["experts"] is the list of checkpoint names
# of every expert and projection, `experts.{e}.{name}`; the names are the models' own (mixtral.py, qwen3_moe.py).
EXPERTS_IN_VLLM = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("kind", EXPERTS_IN_VLLM)
def test_every_name_is_one_that_vllm_expands_and_every_delta_is_the_experts(kind: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "init": "kaiming", "scaling": 0.5}
    model = lorasb.patch(make(kind), r=3, **options).eval()
    tensors = exported(model, tmp_path, format="vllm")
    adapted = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    want = {name: delta for name, delta in adapted.items() if name.endswith("q_proj")}
    experts, (gate, up, down) = EXPERTS_IN_VLLM[kind]
    for i, e in itertools.product(range(2), range(4)):
        name, ours = f"model.layers.{i}.{experts}.{e}", f"model.layers.{i}.mlp.experts"
        want[f"{name}.{gate}"], want[f"{name}.{up}"] = adapted[f"{ours}.gate_up_proj.{e}"].chunk(2)
        want[f"{name}.{down}"] = adapted[f"{ours}.down_proj.{e}"]
    for name, delta in want.items():
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        assert a.shape[0] == b.shape[1] == 8  # the smallest rank above 3 that vLLM takes
        tolerances.check(b @ a, delta, tolerances.EXPORT)
    assert not tensors
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("target_parameters")) == (8, 8, None)
    assert set(config["target_modules"]) == {"q_proj", gate, up, down}


SIZES_OF_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_experts": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize("family", ["Mixtral", "Phimoe", "MiniMaxM2", "Lfm2Moe", "Qwen3Moe"])
def test_experts_have_the_names_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """vLLM reads these names."""
    more = {"head_dim": 16, "layer_types": ["full_attention"] * 2, "num_dense_layers": 0} if family != "Mixtral" else {}
    base = causal(family, **SIZES_OF_EXPERTS, **more)
    base.save_pretrained(tmp_path / "base")
    known = {key.removesuffix(".weight") for key in load_file(tmp_path / "base" / "model.safetensors")}
    model = lorasb.patch(base, r=3, init="kaiming", target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    names = {
        key.removeprefix("base_model.model.").partition(".lora_")[0]
        for key in exported(model, tmp_path / "a", format="vllm")
    }
    assert len(names) == 2 * 2 * 3
    assert names <= known


def stock_logits(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of stock PEFT with these tensors as a plain LoRA, each layer at its own rank."""
    factors = ((key.partition(".lora_A"), value) for key, value in tensors.items() if "lora_A" in key)
    ranks = {parts[0].removeprefix("base_model.model."): len(value) for parts, value in factors}
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    plain = peft.get_peft_model(make("llama"), config)
    found = peft.set_peft_model_state_dict(plain, tensors)
    assert not found.unexpected_keys
    return logits(plain.eval())


def test_the_other_side_computes_what_the_trainer_does_after_every_step() -> None:
    model = patched(scaling=0.5, rank_pattern={"k_proj": 2})
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lorasb_R" not in name}
    basis = {name: value.clone() for name, value in lorasb.adapter_delta(model, "basis").items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(**batches_for("llama")[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tensors = lorasb.lora_of(basis, lorasb.adapter_delta(model, "core"))
        tolerances.check(stock_logits(tensors), logits(model.eval()), tolerances.EXPORT)
        tolerances.check_equal(lorasb.adapter_delta(model), tensors)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    half = lorasb.adapter_delta(model, "core", dtype=torch.bfloat16)
    assert {value.dtype for value in half.values()} == {torch.bfloat16}


SMALL = {"r": 3, "init": "kaiming"}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: patched(scaling=0.5),
    "mixtral": lambda: lorasb.patch(make("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS, **SMALL),
    "convolutions": lambda: lorasb.patch(Net(), target_modules=["embed", "conv", "image", "head"], **SMALL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_is_what_the_export_writes(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    written, sent = exported(model, tmp_path), lorasb.adapter_delta(model)
    assert written.keys() == sent.keys()
    tolerances.check([sent[name] for name in written], list(written.values()), tolerances.EXPORT)


def test_what_cannot_be_sent_is_refused() -> None:
    model = patched("llama")
    with pytest.raises(ValueError, match="part must be one of lora, basis, core, got 'all'"):
        lorasb.adapter_delta(model, "all")
    with pytest.raises(ValueError, match="has not been initialized"):
        lorasb.adapter_delta(lorasb.patch(make("llama"), r=4))
    core = lorasb.adapter_delta(model, "core")
    core.pop(next(iter(core)))
    with pytest.raises(ValueError, match="expected R of every layer of the basis"):
        lorasb.lora_of(lorasb.adapter_delta(model, "basis"), core)


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_are_exported(tied: bool, tmp_path: Path) -> None:
    plain = causal("Llama", tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path / "base")
    model = lorasb.patch(plain, r=4, init="random", trainable_token_indices=[3, 5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.5
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    tolerances.check(logits(stock), logits(model.eval()), tolerances.EXPORT)


def test_a_tied_embedding_that_is_saved_is_exported(tmp_path: Path) -> None:
    model = lorasb.patch(llama(), r=4, init="random", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    found = exported(model, tmp_path)
    assert {"embed_tokens", "lm_head"} <= {name.split(".")[-2] for name in found}
    stock = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(stock.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_one_of_several_active_adapters_has_to_be_named(tmp_path: Path) -> None:
    """One of them here uses a basis, whose A and B are exported with its R."""
    model = with_users("ada")
    model.base_model.set_adapter(["default", "ada"])
    for call in (lambda: lorasb.export_lora(model, tmp_path, quiet=True), lambda: lorasb.adapter_delta(model)):
        with pytest.raises(ValueError, match="adapters default, ada are active: name one by adapter_name="):
            call()
    lorasb.export_lora(model, tmp_path, adapter_name="ada", quiet=True)
    model.set_adapter("ada")
    plain = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    tolerances.check(logits(plain), logits(model), tolerances.EXPORT)
