"""Training on several processes: every engine gets what one process gets; killed runs resume from checkpoints."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import torch.distributed as dist
import trainer_ranks
from basis_models import with_users
from models import logits, make, patched, sharded, text
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from processes import ROOT, attempt, python, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import lorasb
from lorasb.checkpoints.shared_factors import DIGEST
from lorasb.layers.lookup import layers_with

SUPPORT, CONFIGS = ROOT / "tests" / "support", ROOT / "docs" / "accelerate"
# without DS_ACCELERATOR, DeepSpeed looks for GPUs first
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
WRAP = ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
ENGINES = ("ddp", "fsdp2")
WAYS = ("ddp", "fsdp", "fsdp bf16", "fsdp 4-bit", "fsdp experts")
ROWS = [text(1, 12, seed) for seed in range(8)]
STEPS = 3


def torchrun(size: int) -> list[object]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]


def accelerate(config: str, size: int = 2) -> list[object]:
    wrap = WRAP if config == "fsdp2.yaml" else []
    return ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / config, *wrap, "--num_processes", size]


def model_for(way: str) -> nn.Module:
    """A patched model, before it is initialized."""
    family = "mixtral" if "experts" in way else "llama"
    base: Any = make(family, dtype=torch.bfloat16 if "bf16" in way or "4-bit" in way else torch.float32)
    if "4-bit" in way:
        base = lorasb.quantize(base, storage=torch.bfloat16)
    experts = ["experts.gate_up_proj", "experts.down_proj"] if "experts" in way else None
    return lorasb.patch(base, r=4, target_parameters=experts)


def cores(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every R, gathered if it is sharded."""
    found = {name: p for name, p in model.named_parameters() if "lorasb_R" in name}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in found.items()}


def write_all(folder: Path, size: int, rank: int) -> None:
    """Train in every way on this rank; the first rank writes the results."""
    for way in WAYS:
        found = train_in_a_loop(way, rank, size)
        if rank == 0:
            (folder / f"{way}.{size}.json").write_text(json.dumps(found))


def train_in_a_loop(way: str, rank: int, size: int) -> dict[str, Any]:
    """Train a few steps; return the losses, every R before them, and how far each has moved."""
    model = model_for(way)
    if size > 1 and way != "ddp":  # DDP wraps the model after the initialization, as Trainer does
        model = sharded(model)
    lorasb.initialize(model, ROWS[rank::size], lr=1e-2, progress=False)
    start = cores(model)
    model.train()
    run: Any = nn.parallel.DistributedDataParallel(model) if way == "ddp" and size > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for step in range(STEPS):
        rows = [ROWS[(step * 4 + i) % 8] for i in range(4)][rank::size]
        loss = sum(run(**row).loss for row in rows) / len(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = torch.tensor(loss.item() / size)
        if size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    moved = {name: value - start[name] for name, value in cores(model).items()}
    values = {"start": start, "moved": moved}
    return {"losses": losses, **{key: {n: v.tolist() for n, v in part.items()} for key, part in values.items()}}


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of one process and of two, for each way to train."""
    folder = tmp_path_factory.mktemp("loops")
    for way in WAYS:
        (folder / f"{way}.1.json").write_text(json.dumps(train_in_a_loop(way, 0, 1)))
    run_ranks(2, folder, partial(write_all, folder, 2))
    return folder


def check_loops(folder: Path, way: str, size: int) -> None:
    """Check for equal starts, steps and losses, up to the order of sums over ranks."""
    alone, several = (json.loads((folder / f"{way}.{count}.json").read_text()) for count in (1, size))
    assert several["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][-1] != pytest.approx(alone["losses"][0], rel=1e-5)
    for part, bound in (("start", tolerances.PROCESS_SUMS), ("moved", tolerances.STEPS)):
        assert alone[part].keys() == several[part].keys()
        for name, value in alone[part].items():
            tolerances.check_scaled(torch.tensor(several[part][name]), torch.tensor(value), bound)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process(loops: Path, way: str) -> None:
    check_loops(loops, way, 2)


@pytest.mark.long
def test_four_ranks_train_as_one_process(loops: Path) -> None:
    run_ranks(4, loops, partial(write_all, loops, 4))
    for way in WAYS:
        check_loops(loops, way, 4)


def train(start: list[object], folder: Path, *options: object) -> dict[str, Any]:
    """Run tests/support/trainer_ranks.py, in this process if `start` is empty; return what it found."""
    if start:
        python(*start, SUPPORT / "trainer_ranks.py", folder, *options, **ENVIRONMENT)
    else:
        trainer_ranks.run(folder, trainer_ranks.parse([folder, *options]))
    return found_in(folder)


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def kill(start: list[object], folder: Path, *options: object) -> None:
    """Run training, and kill a rank between two checkpoints."""
    given = ("--kill", trainer_ranks.CUT_AFTER, *options)
    assert attempt(*start, SUPPORT / "trainer_ranks.py", folder, *given, **ENVIRONMENT).returncode != 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "found.json").exists()


def factors(adapter: Path, bits: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All A, R and B of a saved adapter, loaded by one process."""
    base: Any = make("llama", dtype=dtype)
    model = PeftModel.from_pretrained(lorasb.quantize(base) if bits == 4 else base, adapter)
    model(**text(1, 5, 0))  # raises if a layer is not initialized
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lorasb_" in name}


def same_factors(first: Path, second: Path, bound: tolerances.Tolerance, **options: Any) -> None:
    ours, theirs = factors(first, **options), factors(second, **options)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        tolerances.check_scaled(value, theirs[name], bound)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(runs: Path) -> dict[str, Any]:
    """Complete training on one process."""
    return train([], runs / "alone")


@pytest.fixture(scope="module")
def whole(runs: Path) -> dict[str, dict[str, Any]]:
    """Complete training on two processes, and its end once more; FSDP uses the shipped configuration file."""
    options = trainer_ranks.parse([runs / "ddp", "--again", runs / "ddp again"])
    run_ranks(2, runs, partial(trainer_ranks.run_all, options))
    train(accelerate("fsdp2.yaml"), runs / "fsdp2", "--again", runs / "fsdp2 again")
    return {name: found_in(runs / name) for name in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
def test_trainer_gets_what_one_process_gets(engine: str, runs: Path, alone: Any, whole: Any) -> None:
    found = whole[engine]
    assert found["size"] == 2
    assert found["initialized"]
    assert found["sharded"] == (engine == "fsdp2")
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    same_factors(runs / engine / "adapter", runs / "alone" / "adapter", tolerances.STEPS)


@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_from_a_checkpoint(engine: str, runs: Path, whole: Any) -> None:
    found = found_in(runs / f"{engine} again")
    assert not found["initialized"]
    assert found["losses"][-2:] == whole[engine]["losses"][-2:]
    same_factors(runs / f"{engine} again" / "adapter", runs / engine / "adapter", tolerances.EXACT)


def test_a_run_of_two_goes_on_alone(runs: Path, whole: Any) -> None:
    folder = runs / "ddp alone again"
    shutil.copytree(runs / "ddp again", folder, ignore=shutil.ignore_patterns("checkpoint-6"))
    found = train([], folder, "--resume")
    assert found["size"] == 1
    assert found["losses"][-1] == pytest.approx(whole["ddp"]["losses"][-1], rel=1e-4)
    same_factors(folder / "adapter", runs / "ddp" / "adapter", tolerances.STEPS)


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "bits", "dtype"),
    [("ddp", 16, "float32"), *(("fsdp2", *one) for one in ((16, "bfloat16"), (4, "float32"), (4, "bfloat16")))],
)
def test_a_killed_rank_leaves_whole_checkpoints_and_training_goes_on(
    engine: str, bits: int, dtype: str, runs: Path
) -> None:
    options, start = ["--bits", bits, "--dtype", dtype], accelerate(f"{engine}.yaml")
    again = torchrun(2) if engine == "ddp" else start
    cut, full = (runs / f"{kind} {engine} {bits} {dtype}" for kind in ("cut", "full"))
    whole = train(start, full, *options)
    kill(start, cut, *options)
    assert train(again, cut, "--resume", *options)["losses"][-2:] == whole["losses"][-2:]
    assert whole["sharded"] == (engine == "fsdp2")
    for name in ("checkpoint-2", "checkpoint-4", "adapter"):
        same_factors(cut / name, full / name, tolerances.EXACT, bits=bits, dtype=getattr(torch, dtype))


@pytest.mark.long
def test_trainer_on_four_ranks(runs: Path, alone: Any) -> None:
    for engine, start in (("ddp", torchrun(4)), ("fsdp2", accelerate("fsdp2.yaml", 4))):
        found = train(start, runs / f"{engine} of four")
        assert found["size"] == 4
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        same_factors(runs / f"{engine} of four" / "adapter", runs / "alone" / "adapter", tolerances.STEPS)


def test_factors_that_are_partitioned_are_not_left_out_of_a_file(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4)
    lorasb.initialize(model, [text(1, 12, 0)], lr=1e-3, progress=False)
    factor = next(p for name, p in model.named_parameters() if "lorasb_A" in name)
    factor.ds_id, factor.data = 1, torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"partitioned by ZeRO-3.*InitCallback"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_an_error_on_one_rank_while_the_rate_is_measured_is_raised_on_both(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model, batch = lorasb.patch(make("llama"), r=4, init="random"), text(1, 12, 0)
        if rank == 1:
            batch["input_ids"] = batch["input_ids"] + 10_000  # outside of the vocabulary
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|measuring activations failed on rank 1"):
            lorasb.initialize(model, [batch], lr="auto", progress=False)

    run_ranks(2, tmp_path, work)


def test_a_sharded_model_is_merged_and_unmerged(tmp_path: Path) -> None:
    def work(_: int) -> None:
        want = logits(patched().eval())
        model = sharded(patched().eval())
        tolerances.check(logits(model), want, tolerances.PROCESS_SUMS)
        model.merge_adapter()
        tolerances.check(logits(model), want, tolerances.MERGE)
        model.unmerge_adapter()
        tolerances.check(logits(model), want, tolerances.MERGE)

    run_ranks(2, tmp_path, work)


def test_a_sharded_model_with_adapters_on_a_basis_takes_a_state_dict(tmp_path: Path) -> None:
    def work(_: int) -> None:
        source, model = with_users("ada"), sharded(with_users("ada"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = {name: value.clone() for name, value in source.state_dict().items()}
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        for one in (source, model):
            one.eval().set_adapter("ada")
        tolerances.check(logits(model), logits(source), tolerances.PROCESS_SUMS)
        assert all(one.lorasb_A["ada"] is one.lorasb_A["default"] for one in layers_with(model, "ada").values())

    run_ranks(2, tmp_path, work)


def test_what_needs_whole_factors_refuses_a_sharded_model(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = sharded(with_users("ada"))
        state = {**get_peft_model_state_dict(patched()), DIGEST: torch.zeros(32, dtype=torch.uint8)}
        calls: list[tuple[Callable[[], object], str]] = [
            (lambda: lorasb.export_lora(model, tmp_path / f"lora {rank}", adapter_name="ada"), "got shards of it"),
            (lambda: lorasb.adapter_delta(model, adapter_name="ada"), "got shards of it"),
            (lambda: lorasb.add_adapters(model, ["bob"]), "before fully_shard"),
            (lambda: set_peft_model_state_dict(model, state, "ada"), "before fully_shard"),
            (lambda: model.train()(**text(2, 6, 0), adapter_names=["ada", "default"]), "train .* with DDP"),
        ]
        for call, message in calls:
            with pytest.raises((ValueError, TypeError), match=message):
                call()

    run_ranks(2, tmp_path, work)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_what_one_process_gets_and_goes_on(stage: int, runs: Path) -> None:
    pytest.importorskip("deepspeed", reason="make test-all installs it")
    alone = train([], runs / "first", "--first")
    start, whole, cut = accelerate(f"zero{stage}.yaml"), runs / f"zero{stage}", runs / f"zero{stage} cut"
    found = train(start, whole, "--first")
    assert found["size"] == 2
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    same_factors(whole / "adapter", runs / "first" / "adapter", tolerances.STEPS)
    kill(start, cut, "--first")
    assert train(start, cut, "--first", "--resume")["losses"][-2:] == found["losses"][-2:]
    same_factors(cut / "adapter", whole / "adapter", tolerances.EXACT)
