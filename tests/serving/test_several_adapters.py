"""Adapters trained in shared batches match each trained alone, in a hand-written loop and by transformers.Trainer."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import trainer_runs
import transformers
from accelerate.data_loader import DataLoaderDispatcher
from basis_models import NAMES, a_layer, with_users
from models import make
from peft import PeftModel
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tolerances import FP32_NORMS, FP64, check, check_equal
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from trainer_runs import ROWS, At

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving import training
from lorasb.serving.training import adapter_losses

RATES = {"ada": 1e-2, "emmy": 3e-3, "grace": 1e-3, "default": 1e-3}
NORM = 0.05  # clips every adapter
OWNERS = ("ada", "emmy", "ada", "grace", "__base__", "ada", "default", "emmy", "ada", "grace", "emmy", "emmy")


def example(i: int) -> dict[str, Any]:
    """One of twelve rows with different numbers of labeled tokens; not every adapter has rows in each batch of four."""
    ignored = torch.arange(12) < i % 5
    return ROWS[i] | {"labels": ROWS[i]["labels"].masked_fill(ignored, -100), "user": OWNERS[i]}


EXAMPLES = [example(i) for i in range(12)]
COLLATE = lorasb.AdapterRowsCollator(transformers.default_data_collator, column="user")
BATCHES = [COLLATE(EXAMPLES[i : i + 4]) for i in (0, 4, 8)]


def cores(model: PeftModel, name: str) -> list[Tensor]:
    return [layer.lorasb_R[name].detach() for layer in layers_with(model, name).values()]


def train(model: PeftModel) -> None:
    """Train all adapters together in a hand-written loop."""
    model.train()
    optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, list(RATES), RATES, weight_decay=0.01))
    for batch in 2 * BATCHES:
        names, labels = batch["adapter_names"], batch["labels"]
        optimizer.zero_grad()
        losses = lorasb.adapter_losses(model(input_ids=batch["input_ids"], adapter_names=names).logits, labels, names)
        torch.stack(list(losses.values())).sum().backward()
        lorasb.clip_by_adapter(optimizer.param_groups, NORM)
        optimizer.step()


def train_alone(name: str, steps: list[list[dict[str, Any]]]) -> PeftModel:
    """Return a model with one adapter trained on its own rows of each step, in a loop that ignores the others."""
    model = with_users(*NAMES).double().train()
    model.set_adapter(name)
    parameters = [layer.lorasb_R[name] for layer in layers_with(model, name).values()]
    optimizer, start = torch.optim.AdamW(parameters, lr=RATES[name], weight_decay=0.01), parameters[0].detach().clone()
    for batches in steps:
        logits, labels = [], []
        for batch in batches:
            rows = [i for i, owner in enumerate(batch["adapter_names"]) if owner == name]
            if rows:
                logits.append(model(input_ids=batch["input_ids"][rows]).logits)
                labels.append(batch["labels"][rows])
        if logits:
            whole, targets = torch.cat(logits), torch.cat(labels)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, NORM)
            optimizer.step()
    assert not torch.equal(parameters[0], start)
    return model


def test_together_is_as_alone_and_others_stay_frozen() -> None:
    together = with_users(*NAMES).double()
    train(together)
    for name in RATES:
        check(cores(together, name), cores(train_alone(name, [[batch] for batch in 2 * BATCHES]), name), FP64)
        lorasb.adapter_parameter_groups(together, [name], 1e-3)
        assert [other for other in RATES if a_layer(together).lorasb_R[other].requires_grad] == [name]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by_torch", [False, True])
def test_recomputed_activations_have_their_rows_adapters(reentrant: bool, by_torch: bool) -> None:
    kept, recomputed = with_users(*NAMES), with_users(*NAMES)
    if by_torch:
        way = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        blocks = recomputed.get_base_model().model.layers
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block, way)
        recomputed.config.use_cache = False  # a recomputed block would read keys and values of the first forward
    else:
        recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        recomputed.enable_input_require_grads()
    calls = []
    a_layer(recomputed).register_forward_hook(lambda *_: calls.append(1))
    for model in (kept, recomputed):
        train(model)
    assert len(calls) == 12  # twice per step
    for name in RATES:
        check_equal(cores(kept, name), cores(recomputed, name))
    left = [sum(len(module._forward_pre_hooks) for module in model.modules()) for model in (kept, recomputed)]
    assert left[0] == left[1]


def test_norms_are_those_of_each_and_are_clipped_apart() -> None:
    model = with_users(*NAMES).train()
    groups = lorasb.adapter_parameter_groups(model, NAMES, 1e-3)
    for scale, group in zip((1.0, 1e-6), groups, strict=False):
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, scale)
    norms = lorasb.clip_by_adapter(groups, 0.5)
    assert set(norms) == {"ada", "emmy"}
    after = [torch.cat([p.grad.flatten() for p in group["params"]]).norm() for group in groups[:2]]
    torch.testing.assert_close(after[0], torch.tensor(0.5))
    assert abs(float(after[1]) - norms["emmy"]) < 1e-9


def test_what_cannot_be_is_refused() -> None:
    model = with_users(*NAMES)
    with pytest.raises(ValueError, match="adapter 'nobody' is no adapter of this model"):
        lorasb.adapter_parameter_groups(model, ["nobody"], 1e-3)
    with pytest.raises(ValueError, match="adapter 'grace' has no learning rate in lr"):
        lorasb.adapter_parameter_groups(model, NAMES, {"ada": 1e-3, "emmy": 1e-3})
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"n names, got \[2, 3, 5\], \[2, 3\] and 1"):
        lorasb.adapter_losses(logits, labels, ["ada"])
    with pytest.raises(ValueError, match="adapter 'emmy' has no labeled token in this batch"):
        lorasb.adapter_losses(logits, torch.stack((labels[0], labels[1] - 100)), ["ada", "emmy"])


def trainer_for(model: PeftModel, folder: Path, **options: object) -> Any:
    """A trainer of the three adapters that records its batches in a list."""
    batches: list[dict[str, Any]] = []
    usual = {"per_device_train_batch_size": 4, "max_grad_norm": NORM, "lr_scheduler_type": "constant"}
    optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, NAMES, RATES, weight_decay=0.01))
    found = trainer_runs.trainer(
        model,
        folder,
        [lorasb.AdapterRowsCallback()],
        EXAMPLES,
        (optimizer, None),
        collate=lambda rows: batches.append(COLLATE(rows)) or batches[-1],
        remove_unused_columns=False,
        **usual | options,
    )
    found.batches = batches
    return found


def test_each_is_trained_as_alone(tmp_path: Path) -> None:
    together = with_users(*NAMES).double()
    trainer = trainer_for(together, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    before = cores(together, "default")[0].clone()
    trainer.train()
    steps = [trainer.batches[i : i + 2] for i in range(0, 8, 2)]
    assert torch.equal(cores(together, "default")[0], before)
    for name in NAMES:
        check(cores(together, name), cores(train_alone(name, steps), name), FP32_NORMS)


def test_the_loss_that_is_shown_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model = with_users(*NAMES)
    trainer = trainer_for(model, tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    want = with_users(*NAMES).train()
    trainer.train()
    total, count = 0.0, 0
    for batch in trainer.batches[:2]:
        names, labels = batch["adapter_names"], batch["labels"]
        kept = [i for i, name in enumerate(names) if name != "__base__"]
        with torch.no_grad():
            logits = want(input_ids=batch["input_ids"], adapter_names=names).logits[kept, :-1].flatten(0, 1)
        targets = labels[kept, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((labels[:, 1:] != -100).sum())
    shown = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(shown - total / count) < 1e-3


def test_a_checkpoint_has_all_of_them_and_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = with_users(*NAMES)
    trainer_for(whole, tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(NAMES)
    resumed = with_users(*NAMES)
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(folder))
    for name in NAMES:
        check_equal(cores(whole, name), cores(resumed, name))


def test_rows_of_the_base_alone_are_a_step_of_nobody(tmp_path: Path) -> None:
    model = with_users(*NAMES)
    before = {name: cores(model, name)[0].clone() for name in NAMES}
    trainer = trainer_for(model, tmp_path, max_steps=2)
    trainer.train_dataset = [row | {"user": "__base__"} for row in EXAMPLES]
    trainer.train()
    assert all(torch.equal(cores(model, name)[0], before[name]) for name in NAMES)


def train_rank(folder: Path, checkpointing: bool, rank: int) -> None:
    """One rank gets only rows of the base, the other only rows of `ada`; write which adapters changed."""
    model = with_users(*NAMES)
    before = {name: cores(model, name)[0].clone() for name in NAMES}
    options = {"max_steps": 1, "save_strategy": "no", "gradient_checkpointing": checkpointing}
    trainer = trainer_for(model, folder, per_device_train_batch_size=2, **options)
    rows = [row | {"user": "__base__" if i % 4 > 1 else "ada"} for i, row in enumerate(EXAMPLES[:8])]
    trainer.train_dataset = rows
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    moved = [name for name in NAMES if not torch.equal(cores(model, name)[0], before[name])]
    (folder / f"moved.{rank}").write_text(" ".join(moved))


# with checkpointing, the embeddings' outputs require a gradient, so that the loss of these rows has one, too
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rank_may_have_rows_of_the_base_alone(tmp_path: Path, checkpointing: bool) -> None:
    run_ranks(2, tmp_path, partial(train_rank, tmp_path, checkpointing))
    assert [(tmp_path / f"moved.{rank}").read_text() for rank in (0, 1)] == ["ada", "ada"]


def train_uneven(folder: Path, ranks: int, accumulation: int, rank: int) -> None:
    """Train on a number of rows that the ranks' batches do not divide, in order; write the R's."""
    model = with_users(*NAMES).double()
    options = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(model, folder, **options)
    trainer.train_dataset = rows = EXAMPLES[:9] + EXAMPLES[10:11]
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    if rank == 0:
        found = {f"{name} {i}": core for name in NAMES for i, core in enumerate(cores(model, name))}
        save_file(found, folder / f"{ranks}.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_repeated_rows_of_an_epochs_end_are_not_counted(tmp_path: Path, accumulation: int) -> None:
    train_uneven(tmp_path, 1, accumulation, 0)
    run_ranks(2, tmp_path, partial(train_uneven, tmp_path, 2, accumulation))
    found, want = (load_file(tmp_path / f"{ranks}.safetensors") for ranks in (2, 1))
    for name, core in want.items():
        check(found[name], core, FP64)


def test_after_an_error_another_trainer_trains_and_clips(tmp_path: Path) -> None:
    model = with_users(*NAMES)
    failed = trainer_for(model, tmp_path)
    failed.add_callback(At(1, lambda: {}["boom"]))
    with pytest.raises(KeyError, match="boom"):
        failed.train()
    again = trainer_for(model, tmp_path)
    again.args = failed.args
    again.args.max_steps = 1
    callback = next(one for one in again.callback_handler.callbacks if isinstance(one, lorasb.AdapterRowsCallback))
    again.train()
    assert callback.max_norm == again.args.max_grad_norm == NORM
    assert not model._forward_pre_hooks


def test_evaluation_has_the_models_own_loss_and_it_and_the_clipping_are_given_back(tmp_path: Path) -> None:
    model = with_users(*NAMES)
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.add_callback(At(1, lambda: trainer.evaluate(EXAMPLES[:4])))  # while the callback's training loss is active
    trainer.train()
    with torch.no_grad():
        want = model.eval()(**BATCHES[0]).loss
    shown = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert abs(shown - float(want)) < 1e-5
    assert trainer.args.max_grad_norm == NORM
    batch = COLLATE(EXAMPLES) | {"adapter_names": None}
    out = model.train()(**batch)
    losses = adapter_losses(out.logits, batch["labels"], ["ada"] * len(OWNERS))
    torch.testing.assert_close(losses["ada"], out.loss)


def test_gradients_that_processes_averaged_are_divided_by_the_tokens_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    two = SimpleNamespace(world_size=2, all_reduce_sum=lambda tensor: 2 * tensor)  # the other process has the same rows
    monkeypatch.setattr(training, "Processes", lambda: two)
    model = with_users(*NAMES)
    optimizer = torch.optim.SGD(lorasb.adapter_parameter_groups(model, NAMES, 1.0))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 12.0)  # the mean over processes of sums over tokens
    callback = lorasb.AdapterRowsCallback()
    callback._labeled = [(("ada", "emmy", "ada"), torch.tensor([3, 2, 1]))]
    callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    gradients = {name: layer.grad for name in NAMES for layer in [a_layer(model, name).lorasb_R[name]]}
    assert torch.equal(gradients["ada"], torch.full_like(gradients["ada"], 3.0))  # 24 over 8 tokens
    assert torch.equal(gradients["emmy"], torch.full_like(gradients["emmy"], 6.0))
    assert gradients["grace"] is None


def test_trainers_that_cannot_train_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_users(*NAMES)
    plain = trainer_for(model, tmp_path)
    plain.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="expected an optimizer with a group for each adapter, got 1 without names"):
        plain.train()
    steps = {"eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = transformers.TrainingArguments(str(tmp_path), **steps, load_best_model_at_end=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"load_best_model_at_end loads the active adapter alone"):
        lorasb.AdapterRowsCallback().on_train_begin(best, None, None)
    sharded = transformers.TrainingArguments(str(tmp_path), fsdp="full_shard", use_cpu=True)
    with pytest.raises(ValueError, match=r"expected training in fp32 or bf16, by one process or DDP, got fsdp"):
        lorasb.AdapterRowsCallback().on_train_begin(sharded, None, None)
    for variable, value in (("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_MIXED_PRECISION", "fp16")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            launched = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
            with pytest.raises(ValueError, match=r"by one process or DDP, got (fsdp|fp16)"):
                lorasb.AdapterRowsCallback().on_train_begin(launched, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Processes", lambda: SimpleNamespace(is_distributed=True))
        stream = {"train_dataloader": Mock(spec=DataLoaderDispatcher)}
        with pytest.raises(ValueError, match='"dispatch_batches": False'):
            lorasb.AdapterRowsCallback().on_train_begin(plain.args, None, None, **stream)
    nameless = trainer_for(model, tmp_path)
    nameless.data_collator = lambda rows: transformers.default_data_collator(
        [{"labels": r["labels"], "input_ids": r["input_ids"]} for r in rows]
    )
    with pytest.raises(ValueError, match="expected a batch with adapter_names and labels, got"):
        nameless.train()
    with pytest.raises(ValueError, match="trains causal language models, whose labels are shifted by one, got T5"):
        lorasb.AdapterRowsCallback().on_train_begin(nameless.args, None, None, make("t5"))
    with pytest.raises(ValueError, match=r"expected a column 'person' in every example, got .*remove_unused_columns"):
        lorasb.AdapterRowsCollator(dict, column="person")([{"user": "ada"}])  # type: ignore[arg-type]
