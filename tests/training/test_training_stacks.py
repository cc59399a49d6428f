"""The stacks that people train with: Trainer's options, TRL, torch.compile, offloading of weights and of activations."""

from __future__ import annotations

from pathlib import Path

import accelerate
import peft
import pytest
import tolerances
import torch
import transformers
from models import batches_for, logits, make, patched
from torch import Tensor
from trainer_runs import ROWS, train, usual

import lorasb
from lorasb.layers.linear import LoRASBLinear

SHORT = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2, "bf16": False}


def trained(folder: Path, size: int = 4, **options: object) -> dict[str, Tensor]:
    model = patched()
    train(model, folder, [], **SHORT | {"per_device_train_batch_size": size} | options)
    return peft.get_peft_model_state_dict(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Tensor]]:
    """What runs without gradient checkpointing end in, without and with autocast."""
    return {autocast: trained(tmp_path_factory.mktemp("plain"), bf16=autocast) for autocast in (False, True)}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_both_ways_changes_nothing(
    tmp_path: Path, plain: dict[bool, dict[str, Tensor]], reentrant: bool, autocast: bool
) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again = trained(tmp_path, bf16=autocast, **options)
    assert all(torch.equal(again[key], value) for key, value in plain[autocast].items())


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    sgd = {"optim": "sgd"}
    whole = trained(tmp_path / "whole", **sgd)
    parts = trained(tmp_path / "parts", size=1, gradient_accumulation_steps=4, **sgd)
    start = peft.get_peft_model_state_dict(patched())
    for key, value in whole.items():
        if key.endswith("lorasb_R"):
            scale = (value - start[key]).abs().max()
            assert scale > 0
            tolerances.check((parts[key] - start[key]) / scale, (value - start[key]) / scale, tolerances.STEPS)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    best["greater_is_better"] = True  # the loss falls with every step, on any machine: so the first is the best
    rate = {"lr_scheduler_type": "constant", "learning_rate": 0.3}
    trainer = train(model, tmp_path, [lorasb.InitCallback(lr=2e-2)], **often, **best, **rate)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    assert losses[max(losses)] < losses[best]  # the last is not the best, so that loading shows
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    left = list(tmp_path.glob("checkpoint-*"))
    assert len(left) <= 2
    assert all(peft.PeftModel.from_pretrained(make("llama"), folder) for folder in left)
    again = peft.PeftModel.from_pretrained(make("llama"), trainer.state.best_model_checkpoint).eval()
    tolerances.check(logits(model.eval()), logits(again), tolerances.EXACT)


def test_trl_patches_initializes_trains_and_saves(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": row["input_ids"].tolist()} for row in ROWS]
    init = lorasb.InitCallback(num_samples=8)
    trainer = trl.SFTTrainer(
        model=make("llama"),
        args=trl.SFTConfig(**usual(tmp_path) | SHORT, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lorasb.LoRASBConfig(r=4, task_type="CAUSAL_LM"),
        callbacks=[init],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    before = logits(make("llama"))
    trainer.train()
    assert init.report is not None
    assert init.report.num_samples == 8
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lorasb_R" in name for name in trainable)
    after = logits(trainer.model.eval())
    assert (after - before).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "adapter").eval()
    tolerances.check(logits(again), after, tolerances.EXACT)


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Words of the tiny models, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(97)} | {"<pad>": 97, "</s>": 98}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="</s>"
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_compiled_models_have_no_graph_break_of_ours(bits: int) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = make("llama")
    model = lorasb.patch(lorasb.quantize(model) if bits == 4 else model, r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    counters.clear()
    batch = batches_for("llama", count=1)[0]
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert found
    model.zero_grad()
    model(**batch).loss.backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    for got, other in zip(found, want, strict=True):
        tolerances.check(got / other.abs().max(), other / other.abs().max(), tolerances.STEPS)


def test_activations_are_offloaded_and_only_u_is_kept() -> None:
    model = patched().train()
    layer = next(module for module in model.modules() if isinstance(module, LoRASBLinear))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    kept: list[Tensor] = []
    own = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own and t.dim() == 2 and t.shape[0] == 5] == [(5, 4)]
    y.sum().backward()
    want = layer.lorasb_R["default"].grad.clone()
    layer.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        layer(x.detach().requires_grad_()).sum().backward()
    assert torch.equal(layer.lorasb_R["default"].grad, want)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_bases_are_reached_through_their_hooks(tmp_path: Path, how: str) -> None:
    model = patched()
    want = logits(model)
    if how == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    tolerances.check(logits(model), want, tolerances.MERGE)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="offload the base model first"):
        model(**batches_for("llama", count=1)[0])


def test_a_base_offloaded_before_patching_is_initialized_and_trained() -> None:
    plain = lorasb.patch(make("llama"), r=4)
    lorasb.initialize(plain, batches_for("llama"), lr=2e-2, progress=False)
    base = make("llama")
    accelerate.cpu_offload(base, torch.device("cpu"))
    model = lorasb.patch(base, r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    tolerances.check(logits(model), logits(plain), tolerances.STEPS)
    for one in (plain, model):
        one.train()
        one(**batches_for("llama", count=1)[0]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        if "lorasb_R" in name:
            scale = p.grad.abs().max()
            tolerances.check(gradients[name] / scale, p.grad / scale, tolerances.STEPS)
