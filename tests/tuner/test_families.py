"""Every family that people fine-tune: patch, both ways of initializing, training, saving, merging, exporting."""

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tolerances
import torch
import transformers
from adapters import layers
from models import EXPERTS, FAMILIES, batches_for, logits, make

import lorasb
from lorasb.layers.lookup import layers_with

PARTS = [(family, {}) for family in FAMILIES]
PARTS += [(family, {"target_parameters": EXPERTS}) for family in ("mixtral", "qwen3_moe")]
PARTS += [("mixtral", {"target_parameters": EXPERTS[1:], "target_modules": []})]


def named(value: Any) -> str:
    return value if isinstance(value, str) else str(len(value))


# t5 has two stacks; tests/init/test_strategies.py compares the others' sums with plain autograd's, bit for bit
OTHERS = [one for one in PARTS if one[0] not in ("t5", "llama", "roberta", "gpt2")]


@pytest.mark.parametrize(("family", "fields"), OTHERS, ids=named)
def test_both_strategies_find_the_same_factors(family: str, fields: dict[str, Any]) -> None:
    found = {}
    for strategy in ("accumulate", "layerwise"):
        model = lorasb.patch(make(family), r=4, **fields)
        report = lorasb.initialize(model, batches_for(family), lr=2e-2, strategy=strategy, progress=False)
        assert report.strategy == strategy
        found[strategy] = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
        assert all(delta.abs().max() > 0 for delta in found[strategy].values())
    for name, delta in found["accumulate"].items():
        tolerances.check_scaled(found["layerwise"][name], delta, tolerances.FACTORS)


@pytest.mark.parametrize(("family", "fields"), PARTS, ids=named)
def test_train_save_load_merge_and_export(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """For a model trained for three steps, whose output equals its base's until it is initialized."""
    before, model = logits(make(family), family), lorasb.patch(make(family), r=4, **fields)
    bound = tolerances.MERGE if "target_parameters" in fields else tolerances.EXACT
    tolerances.check(logits(model, family), before, bound)
    lorasb.initialize(model, batches_for(family), lr=2e-2, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches_for(family):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model.eval(), family)
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make(family), tmp_path / "adapter").eval()
    tolerances.check(logits(again, family), after, tolerances.EXACT)
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    plain = peft.PeftModel.from_pretrained(make(family), tmp_path / "lora").eval()
    assert type(plain.base_model).__name__ == "LoraModel"
    tolerances.check(logits(plain, family), after, tolerances.EXPORT)
    merged = model.merge_and_unload()
    assert not layers(merged)
    assert type(merged) is type(plain.get_base_model())
    tolerances.check(logits(merged, family), after, tolerances.MERGE)


@pytest.mark.parametrize(("family", "left"), [("Mamba", {"in_proj"}), ("Mamba2", {"in_proj"})])
def test_what_fused_kernels_read_is_no_target(family: str, left: set[str]) -> None:
    """When training on a GPU, a Mamba block's kernels read the other linears' weights without calling the linears."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99, "state_size": 8}
    sizes |= {"num_heads": 8, "head_dim": 8, "n_groups": 1} if family == "Mamba2" else {}
    config = getattr(transformers, f"{family}Config")(**sizes)
    make_one = partial(getattr(transformers, f"{family}ForCausalLM"), config)
    found = {name.rpartition(".")[2] for name in layers_with(lorasb.patch(make_one(), r=2), "default")}
    assert found == left
    with pytest.raises(ValueError, match=r"out_proj': its block or the block's fused kernels read its weight"):
        lorasb.patch(make_one(), r=2, target_modules=["out_proj"])


def test_weights_that_a_block_reads_and_never_calls_are_no_targets() -> None:
    """WavLM passes its attention's weights to a torch function."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    config = transformers.WavLMConfig(**sizes, **convolutions, num_conv_pos_embedding_groups=2, vocab_size=20)
    found = {
        name.rpartition(".")[2] for name in layers_with(lorasb.patch(transformers.WavLMModel(config), r=2), "default")
    }
    assert found >= {"intermediate_dense", "output_dense"}
    assert not found & {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_a_model_without_inputs_embeds_has_pefts_plain_wrapper() -> None:
    """Other wrappers pass it, and CLIP would pass it on to encoders that have their own."""
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = part | {"vocab_size": 99}, part | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = lorasb.patch(transformers.CLIPModel(config), r=2)
    batch = {"input_ids": torch.arange(3, 19).view(2, 8), "pixel_values": torch.randn(2, 3, 8, 8), "return_loss": True}
    lorasb.initialize(model, [batch], lr=1e-2, loss_fn=lambda m, b: m(**b).loss, progress=False)
    assert torch.isfinite(model(**batch).loss)
