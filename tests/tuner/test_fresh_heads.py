"""Modules missing from a base checkpoint are fully trained: over transformers' lists of task models, and on loading."""

import inspect
import re
from pathlib import Path

import peft
import pytest
import tolerances
import torch
import transformers
from adapters import adapted, layers
from huggingface_hub.errors import StrictDataclassError
from models import SIZES, batches_for, logits, make, patched
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

import lorasb
from lorasb.tuner.model import LoRASBModel
from lorasb.tuner.targets import save_heads

TASKS = [
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
]  # fmt: skip
LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"]
SMALL = {**dict.fromkeys(LAYERS, 1), "num_labels": 3, "image_size": 64, "num_frames": 4}
NOT_HERE = (ImportError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError)


def classes(task: str) -> list[tuple[str, str]]:
    """A task's model types and classes: one for each distinct code of a head, as transformers repeats itself."""
    found: dict[str, tuple[str, str]] = {}
    for family, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
        for name in [names] if isinstance(names, str) else names:
            kind = getattr(transformers, name)
            prefix = re.match(r"(.*)For", name)[1]
            own = next(one for one in kind.__mro__ if "__init__" in vars(one))
            text = inspect.getsource(own) if own.__name__.startswith("Generic") else inspect.getsource(own.__init__)
            text = re.sub(rf"{prefix}|\b{kind.base_model_prefix}\b", "", re.sub(r"#.*|\"\"\".*?\"\"\"", "", text))
            found.setdefault(re.sub(r"\s+", " ", text), (family, name))
    return list(found.values())


def built(family: str, kind: str) -> tuple[nn.Module, nn.Module] | None:
    """A one-layer task model and its base model, without values; None if this machine cannot build them."""
    for options in (SMALL, {}):
        try:
            config = transformers.CONFIG_MAPPING[family](**options)
            with torch.device("meta"), no_init_weights():
                return getattr(transformers, kind)(config), transformers.AutoModel.from_config(config)
        except (*NOT_HERE, StrictDataclassError):
            continue
    return None


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("task", TASKS)
def test_every_head_of_transformers_is_trained_whole(task: str) -> None:
    """A layer absent from the base model of the same configuration is saved, and PEFT's matching never targets it."""
    count = 0
    for family, kind in classes(task):
        models = built(family, kind)
        if models is None:
            continue
        count, (model, base) = count + 1, models
        children = dict(model.named_children())
        same_type = (name for name, child in children.items() if type(child) is type(base))
        prefix = model.base_model_prefix if model.base_model_prefix in children else next(same_type, "")
        brought = {f"{prefix}.{name}".lstrip(".") for name in linears(base) if "pooler" not in name.split(".")}
        config = lorasb.LoRASBConfig()
        save_heads(model, config)
        saved, names = config.modules_to_save or [], linears(model)
        fresh = [name for name in names if name not in brought]
        assert fresh, kind
        assert [name for name in fresh if not within(name, saved)] == [], kind
        assert [name for name in names if name in brought and within(name, saved)] == [], kind
        config.target_modules = set(names)
        assert not any(LoRASBModel._check_target_module_exists(config, name) for name in fresh), kind
        for name, _ in model.named_modules():  # PEFT compares the ends of names, ignoring dots
            alike = name.endswith(tuple(saved)) and not name.endswith("feature_extractor")  # XVector's convolutions
            assert within(name, saved) or not alike, (kind, name)
    assert count >= 1


def test_an_adapter_is_loaded_over_a_pooler_that_is_new_at_every_load(tmp_path: Path) -> None:
    transformers.DebertaV2Model(make("deberta").config).save_pretrained(tmp_path / "base")
    kind = "DebertaV2ForSequenceClassification"
    base = getattr(transformers, kind).from_pretrained(tmp_path / "base", num_labels=3)
    model = lorasb.patch(base, r=4)
    lorasb.initialize(model, batches_for("deberta"), lr=2e-2, progress=False)
    assert "pooler.dense" in model.peft_config["default"].modules_to_save
    assert not any("pooler" in name for name in adapted(model))
    assert not any("pooler" in name for name in model.peft_config["default"].base_fingerprint)
    optimizer = torch.optim.SGD(lorasb.parameter_groups(model, lr=0.1))
    model(**batches_for("deberta")[0]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    torch.manual_seed(7)  # another process draws other values
    other = getattr(transformers, kind).from_pretrained(tmp_path / "base", num_labels=3)
    again = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    tolerances.check(logits(again, "deberta"), logits(model, "deberta"), tolerances.MERGE)
    pooler = again.base_model.model.pooler.dense
    assert not torch.equal(pooler.original_module.weight, pooler.modules_to_save["default"].weight)


@pytest.mark.parametrize("brought", [True, False])
def test_what_transformers_had_to_make_up_is_known(brought: bool, tmp_path: Path) -> None:
    """Checked for a pooler and the head of a masked language model, with and without them in the checkpoint."""
    config = transformers.BertConfig(max_position_embeddings=64, num_labels=3, **SIZES)
    base = transformers.BertForMaskedLM(config) if brought else transformers.BertModel(config, add_pooling_layer=False)
    base.save_pretrained(tmp_path / "masked")
    masked = lorasb.patch(transformers.BertForMaskedLM.from_pretrained(tmp_path / "masked"), r=4)
    saved = masked.peft_config["default"].modules_to_save
    assert saved == (None if brought else ["cls.predictions.transform.dense"])
    transformers.BertModel(config, add_pooling_layer=brought).save_pretrained(tmp_path / "bert")
    model = lorasb.patch(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "bert"), r=4)
    assert ("bert.pooler.dense" in model.peft_config["default"].modules_to_save) != brought
    assert any("pooler" in name for name in adapted(model)) == brought


def test_parts_that_the_base_model_is_given() -> None:
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 32, "vocab_size": 99, "max_position_embeddings": 16}
    blocks = {"num_blocks": 1, "num_self_attends_per_block": 1}
    heads = {"num_labels": 3, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    config = transformers.PerceiverConfig(**sizes, **blocks, **heads)
    model = lorasb.patch(transformers.PerceiverForSequenceClassification(config), r=4)
    assert model.peft_config["default"].modules_to_save[-1] == "perceiver.decoder"
    for layer in layers(model).values():
        layer.adapters["default"].initialized = True
    batch = batches_for("bert")[0]
    model(**{"inputs" if name == "input_ids" else name: value for name, value in batch.items()}).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and "lorasb_R" not in name]
    assert trained
    assert all("perceiver.decoder.modules_to_save" in name for name in trained)


def test_explicit_targets_and_adapters_that_exist_already(tmp_path: Path) -> None:
    model = patched("deberta", target_modules=["query_proj", "dense"])
    assert not any("pooler" in name for name in adapted(model))
    former = lorasb.LoRASBConfig(r=4, task_type="SEQ_CLS", modules_to_save=["classifier"]).weights_follow()
    old = lorasb.patch(make("deberta"), former)  # as made by versions that did not recognize poolers
    assert any("pooler" in name for name in adapted(old))
    lorasb.initialize(old, batches_for("deberta"), lr=2e-2, progress=False)
    old.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("deberta"), tmp_path).eval()
    assert adapted(again) == adapted(old)
    tolerances.check(logits(again, "deberta"), logits(old, "deberta"), tolerances.EXACT)
