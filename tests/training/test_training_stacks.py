"""Common training stacks: Trainer in every setting, torch.compile, offloading, and InitCallback in the Trainer."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import accelerate
import peft
import pytest
import tolerances
import torch
from gradients import factors
from models import batches_for, llama, logits, make, patched, started
from tolerances import check_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from trainer_runs import ROWS, train

import lorasb
from lorasb.training import init_callback

KINDS = {
    "fp32": (torch.float32, {}),
    "bf16 weights": (torch.bfloat16, {}),
    "bf16 autocast": (torch.float32, {"bf16": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_r_trains_and_resuming_continues_the_run(tmp_path: Path, kind: str) -> None:
    dtype, options = KINDS[kind]
    model = patched(dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path, [], **options)
    for name, parameter in model.named_parameters():
        trains = "lorasb_R" in name
        assert torch.equal(parameter, before[name]) != trains, name
        assert parameter.dtype == (torch.float32 if trains else dtype)
    want = peft.get_peft_model_state_dict(model)
    resumed = patched(dtype=dtype)
    train(resumed, tmp_path, [], resume=str(tmp_path / "checkpoint-2"), **options)
    again = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path / "checkpoint-4")
    for other in (resumed, again):
        check_equal(peft.get_peft_model_state_dict(other), want)


def test_r_has_a_group_of_its_own() -> None:
    model = patched("roberta")
    groups = lorasb.parameter_groups(model, lr=1e-3, other_lr=1e-4, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lorasb_R", 1e-3, 0.0),
        ("other", 1e-4, 0.1),
        ("other, not decayed", 1e-4, 0.0),
    ]
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in groups[0]["params"]} == {id(p) for n, p in model.named_parameters() if "lorasb_R" in n}
    frozen = lorasb.parameter_groups(model, lr=1e-3, other_lr=0.0)
    assert {group["lr"] for group in frozen} == {1e-3, 0.0}
    assert [group["name"] for group in lorasb.parameter_groups(patched(), lr=1e-2)] == ["lorasb_R"]


SHORT = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2, "bf16": False}


def trained(folder: Path, size: int = 4, **options: object) -> dict[str, Tensor]:
    model = patched()
    train(model, folder, [], **SHORT | {"per_device_train_batch_size": size} | options)
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_gradient_checkpointing_both_ways_changes_nothing(tmp_path: Path, autocast: bool) -> None:
    plain = trained(tmp_path, bf16=autocast)
    for reentrant in (False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        check_equal(trained(tmp_path, bf16=autocast, **options), plain)


def test_the_best_checkpoint_of_another_adapter_than_default_is_refused(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    model = lorasb.patch(make("llama"), r=4, adapter_name="math")
    with pytest.raises(
        ValueError, match=r"expected the active adapter 'default' with load_best_model_at_end, .* got math"
    ):
        train(model, tmp_path, [lorasb.InitCallback(lr=2e-2)], **often, load_best_model_at_end=True)


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", optim="sgd")
    parts = trained(tmp_path / "parts", size=1, gradient_accumulation_steps=4, optim="sgd")
    start = peft.get_peft_model_state_dict(patched())
    for key, value in whole.items():
        if key.endswith("lorasb_R"):
            tolerances.check_scaled(parts[key] - start[key], value - start[key], tolerances.STEPS)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    best["greater_is_better"] = True  # the loss falls every step on any machine, so the first checkpoint is best
    rate = {"lr_scheduler_type": "constant", "learning_rate": 0.3}
    trainer = train(model, tmp_path, [lorasb.InitCallback(lr=2e-2)], **often, **best, **rate)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    assert losses[max(losses)] < losses[best]  # the last is not the best, so loading makes a difference
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    left = list(tmp_path.glob("checkpoint-*"))
    assert len(left) <= 2
    assert all(peft.PeftModel.from_pretrained(make("llama"), folder) for folder in left)
    again = peft.PeftModel.from_pretrained(make("llama"), trainer.state.best_model_checkpoint).eval()
    tolerances.check(logits(model.eval()), logits(again), tolerances.EXACT)


def gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of every R on a fixed batch."""
    model.zero_grad()
    model(**batches_for("llama", count=1)[0]).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bits", [16, 4])
def test_compiled_models_have_no_graph_break_of_ours(bits: int) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1).eval()
    model = lorasb.patch(lorasb.quantize(model) if bits == 4 else model, r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    counters.clear()
    found = gradients(torch.compile(model, backend="aot_eager"))
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()
    tolerances.check_scaled(found, gradients(model), tolerances.STEPS)


def test_activations_may_be_offloaded() -> None:
    model = patched().train()
    want = gradients(model)
    with torch.autograd.graph.save_on_cpu():
        check_equal(gradients(model), want)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_bases_are_reached_through_their_hooks(tmp_path: Path, how: str) -> None:
    model = patched()
    want = logits(model)
    offload = accelerate.cpu_offload if how == "cpu" else partial(accelerate.disk_offload, offload_dir=str(tmp_path))
    offload(model, execution_device=torch.device("cpu"))
    tolerances.check(logits(model), want, tolerances.MERGE)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="offload the base model first"):
        model(**batches_for("llama", count=1)[0])


def test_wide_factors_are_reached_through_their_hooks() -> None:
    base = make("llama").to(torch.bfloat16)
    model = lorasb.patch(base, r=4, init="random", wide_factors=True).eval()
    want = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        tolerances.check(logits(model), want, tolerances.MERGE)


def test_a_base_offloaded_before_patching_is_initialized_trained_and_merged() -> None:
    plain, base = patched(), make("llama")
    accelerate.cpu_offload(base, torch.device("cpu"))
    model = lorasb.patch(base, r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    tolerances.check(logits(model), logits(plain), tolerances.MERGE)
    tolerances.check_scaled(gradients(model.train()), gradients(plain.train()), tolerances.STEPS)
    tolerances.check(*(logits(one.eval().merge_and_unload()) for one in (model, plain)), tolerances.EXPORT)


def test_the_callback_initializes_as_one_does_by_hand(tmp_path: Path) -> None:
    callback = lorasb.InitCallback(num_samples=6, seed=5)
    model = lorasb.patch(make("llama"), r=4)
    train(model, tmp_path, [callback], warmup_steps=2)
    assert callback.report.lr == pytest.approx(1e-2 / 2)
    assert callback.report.num_samples == 6
    by_hand, report = started(batches=DataLoader(ROWS, batch_size=3), lr=5e-3, num_samples=6, seed=5)
    a, b = (([layer.energy_sign for layer in found.layers], found.loss) for found in (callback.report, report))
    assert a == b
    frozen = {name: value for name, value in factors(by_hand).items() if "lorasb_R" not in name}
    assert all(torch.equal(value, factors(model)[name]) for name, value in frozen.items())
    assert model.peft_config["default"].init_provenance["num_samples"] == 6


def test_batches_whose_rows_cannot_be_told_apart_are_taken_row_by_row(tmp_path: Path) -> None:
    """Image collators return such batches: the patches of all rows are concatenated."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return joined | {"patches": torch.zeros(3 * len(rows), 4)}

    loader = DataLoader(ROWS, batch_size=3, collate_fn=collate)
    found = list(init_callback._batches(loader, 3, 6, 5))
    assert [len(batch["input_ids"]) for batch in found] == [1] * 6


def test_the_callback_changes_no_order_of_training(tmp_path: Path) -> None:
    """Nor does it change the global random state, from which dropout would draw."""
    found = []
    for model, callbacks in ((patched(), []), (lorasb.patch(make("llama"), r=4), [lorasb.InitCallback()])):
        seen: list[Tensor] = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda embedding, args, seen=seen: seen.append(args[0].clone()) if embedding.training else None
        )
        train(model, tmp_path, callbacks)
        assert len(seen) == 4
        found.append([*seen, torch.get_rng_state()])
    check_equal(*found)


def test_the_callback_leaves_an_initialized_adapter_alone(tmp_path: Path) -> None:
    model, callback = patched(), lorasb.InitCallback()
    frozen = {name: value for name, value in factors(model).items() if "lorasb_R" not in name}
    train(model, tmp_path, [callback])
    assert callback.report is None
    assert all(torch.equal(value, factors(model)[name]) for name, value in frozen.items())


def test_copies_of_r_in_the_optimizer_are_refused(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    copies = [p.detach().clone().requires_grad_(True) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(copies, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ValueError, match=r"does not hold R of layer 'model\.layers\.0\..* \(14 of 14\).*before making"):
        train(model, tmp_path, [lorasb.InitCallback()], optimizers=(optimizer, schedule))
    assert not any(value.any() for value in factors(model).values())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(ROWS)


def test_the_callback_reads_a_stream(tmp_path: Path) -> None:
    callback = lorasb.InitCallback(num_samples=5)
    train(lorasb.patch(make("llama"), r=4), tmp_path, [callback], Stream())
    assert (callback.report.num_samples, callback.report.lr) == (5, pytest.approx(1e-2))


@pytest.mark.parametrize(
    ("count", "data", "adapted", "message"),
    [
        (None, Stream(), True, r"a stream: say how many samples, InitCallback\(num_samples=64\)"),
        (99, Stream(), True, "num_samples=99, but the batches hold 12 samples"),
        (99, ROWS, True, "num_samples=99, but the batches hold 12 samples"),
        (None, ROWS, False, r"call model = lorasb\.patch\(model\) first"),
    ],
)
def test_what_the_callback_cannot_initialize(
    tmp_path: Path, count: int | None, data: object, adapted: bool, message: str
) -> None:
    model = lorasb.patch(make("llama"), r=4) if adapted else make("llama")
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, [lorasb.InitCallback(num_samples=count)], data)


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_the_callback_takes_a_model_as_the_trainer_has_made_it(tmp_path: Path, option: str) -> None:
    """accelerate wraps the model's forward; checkpointing makes the embeddings' output require a gradient."""
    callback = lorasb.InitCallback(num_samples=6)
    train(lorasb.patch(make("llama"), r=4), tmp_path, [callback], **{option: True})
    assert (callback.report.strategy, callback.report.num_samples) == ("layerwise", 6)
