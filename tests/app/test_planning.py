"""What a run needs: fake tensors plan what real ones take, first steps give the estimate, bad input gets one line."""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from command import call

import lorasb
from lorasb.app import plan, tables, train
from lorasb.app.plan import LiveBytes, Request, count_step, plan_memory
from lorasb.app.prepare import checkpoint_activations
from lorasb.app.settings import Settings
from lorasb.app.tokenize import Encoded
from lorasb.utils.precision import Precision

BATCH, SEQ = 3, 40
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=300, architectures=["GPT2LMHeadModel"], resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0
    ),
}  # fmt: skip


def request_for(folder: Path, config: Any = CONFIGS["llama"], **options: Any) -> Request:
    """Save a config in a folder and return a request to plan its run; the default is one row of SEQ tokens."""
    config.save_pretrained(folder)
    return Request(str(folder), **{"r": 8, "batch": 1, "seq": SEQ} | options)


def made(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What `--dtype auto` selects with and without bf16 products, whatever this machine has."""
    monkeypatch.setattr(plan, "native", lambda device: Precision(request.param, "a test"))
    found: torch.dtype = getattr(torch, request.param)
    return found


def real_step(config: Any, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes beyond the model's that real tensors take: after a forward, and at a step's peak."""
    with LiveBytes() as live:
        model: Any = lorasb.patch(made(config), r=8, init="random").train()
        if checkpointing:
            checkpoint_activations(model.get_base_model())
            model.config.use_cache = False
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        gc.collect()
        model_bytes = live.peak = live.now
        loss = model(input_ids=ids, labels=ids)["loss"]
        saved = live.now - model_bytes
        loss.backward()
        optimizer.step()
    return saved, live.peak - model_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fake_step_counts_what_a_real_one_takes(family: str, checkpointing: bool) -> None:
    config = CONFIGS[family]
    with torch.device("meta"):
        model = made(config)
    found = count_step(lorasb.patch(model, r=8), BATCH, SEQ, checkpointing)
    saved, peak = real_step(config, checkpointing)
    assert found.saved == pytest.approx(saved, rel=0.05)
    assert found.saved + found.temporary == pytest.approx(peak, rel=0.05)


def test_live_bytes_follow_tensors_that_come_and_go() -> None:
    with LiveBytes() as live:
        one = torch.zeros(100, dtype=torch.float32)
        view = one[10:]
        assert live.now == 400
        two = one + 1
        assert (live.now, live.peak) == (800, 800)
        del two
        assert (live.now, live.peak) == (400, 800)
        del one
        assert live.now == 400  # the view still holds the memory
        del view
        assert live.now == 0


def test_a_plan_adds_up(dtype: torch.dtype, tmp_path: Path) -> None:
    found = plan_memory(request_for(tmp_path, batch=BATCH))
    model: Any = lorasb.patch(made(CONFIGS["llama"], dtype), r=8, init="random")
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    base = sum(size for name, size in sizes.items() if "lorasb" not in name)
    assert base <= found.base <= base + 1000  # rotary frequencies are a buffer
    assert found.cores == sum(size for name, size in sizes.items() if "lorasb_R" in name) == 4 * found.trained
    assert found.factors == sum(size for name, size in sizes.items() if "lorasb_A" in name or "lorasb_B" in name)
    assert found.optimizer >= 3 * found.cores
    assert found.fits
    assert found.seconds > 0


def test_four_bits_and_a_card(tmp_path: Path) -> None:
    card = plan.find_gpu("a6000")
    dense, packed = (plan_memory(request_for(tmp_path, bits=bits, card=card)) for bits in (16, 4))
    model: Any = lorasb.quantize(made(CONFIGS["llama"]), nested=True)
    weights = [m.quantized() for m in model.modules() if isinstance(m, lorasb.Linear4bit)]
    saved = sum(2 * math.prod(weight.shape) - weight.nbytes for weight in weights)
    assert dense.base - packed.base == pytest.approx(saved, rel=0.05)
    assert packed.scratch == 2 * 160 * 64
    assert dense.context == packed.context > 0


def test_what_does_not_fit_is_told_what_does(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    wide = transformers.LlamaConfig(**CONFIGS["llama"].to_dict() | sizes)
    whole = plan_memory(request_for(tmp_path, wide, batch=8, seq=256, card=plan.find_gpu("a6000")))
    refused = with_less_memory(whole, 0.7)
    assert not refused.fits
    ((change, better),) = plan.smaller_plans(refused)
    assert better.fits
    assert change.startswith("--")
    assert not list(plan.smaller_plans(with_less_memory(whole, -1)))


def with_less_memory(whole: plan.MemoryPlan, share: float) -> plan.MemoryPlan:
    """Return the plan on a card that has only a share of the memory needed."""
    card = replace(whole.request.card, memory=int(plan.CONTEXT + share * (whole.needed - plan.CONTEXT)))
    return plan_memory(replace(whole.request, card=card))


def test_a_card_without_bf16_is_planned_in_fp32(tmp_path: Path) -> None:
    old, new = (plan_memory(request_for(tmp_path, card=plan.find_gpu(name))) for name in ("t4", "a6000"))
    assert old.base == pytest.approx(2 * new.base, rel=0.01)
    assert old.saved > 1.5 * new.saved
    started = (found.initialization - found.base - found.factors - found.cores - found.context for found in (old, new))
    assert next(started) > 1.2 * next(started)


def test_experts_that_a_token_goes_through_are_counted(tmp_path: Path) -> None:
    sizes = {name: getattr(CONFIGS["llama"], name) for name in SIZES} | {"num_hidden_layers": 2}
    flops = []
    for used in (1, 4):
        experts = {"num_local_experts": 4, "num_experts_per_tok": used, "architectures": ["MixtralForCausalLM"]}
        config = transformers.MixtralConfig(**sizes, **experts)
        flops.append(plan_memory(request_for(tmp_path / str(used), config, card=plan.find_gpu("t4"))).flops)
    experts = 3 * 3 * 64 * 160 * 2  # three more experts of three matrices each, in two layers
    assert flops[1] - flops[0] == pytest.approx(4 * experts * SEQ)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHORT = {"n_positions": 16}
NO_MODEL = r"cannot read the config of|no language model can be made of"
REFUSED = {
    "short": (CONFIGS["gpt2"], SHORT, {"seq": 64}, "has 16 learned positions, got 64 tokens: take a smaller --max-length"),
    "bits": (CONFIGS["gpt2"], SHORT, {"bits": 4, "seq": 16}, r"--bits 4: .* has no linear layer that lorasb.quantize"),
    "activation": (CONFIGS["llama"], {"hidden_act": "nope"}, {}, NO_MODEL),
    "width": (CONFIGS["llama"], {"hidden_size": 65}, {}, NO_MODEL),
    "packed": (CONFIGS["llama"], {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, {}, "is quantized already: plan for its dense base, with --bits 4"),
    "no linears": (transformers.ResNetConfig(architectures=["ResNetModel"]), {}, {}, r"cannot be patched|no language model|cannot be computed"),
    "images": (transformers.ViTConfig(**SMALL, architectures=["ViTForImageClassification"]), {}, {"seq": 64}, "a step of 1 x 64 tokens cannot be computed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_cannot_run_is_told_in_a_line(tmp_path: Path, name: str) -> None:
    config, fields, options, message = REFUSED[name]
    request = request_for(tmp_path, config, **options)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        plan_memory(request)


def test_bits_that_change_nothing_are_not_proposed(tmp_path: Path) -> None:
    request = request_for(tmp_path, CONFIGS["gpt2"], batch=8, seq=16, card=plan.find_gpu("a6000"))
    refused = with_less_memory(plan_memory(request), 0.8)
    assert not any("--bits" in change for change, _ in plan.smaller_plans(refused))


def test_cards_are_found_however_they_are_written() -> None:
    for name in ("a6000", "RTX A6000", "NVIDIA RTX A6000", "A6000"):
        assert plan.find_gpu(name).memory == 48 * 2**30
    assert plan.find_gpu("A100").memory < plan.find_gpu("a100-80gb").memory
    with pytest.raises(ValueError, match="--gpu 'a7000' is not known: did you mean 'a6000'"):
        plan.find_gpu("a7000")


@pytest.mark.parametrize(
    ("speed", "memory", "billions"), [(4e11, 24e9, "0.7"), (4e14, 24e9, "3"), (2.2e10, 24e9, "0.04")]
)
def test_a_machine_is_good_for_what_time_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, speed: float, memory: float, billions: str
) -> None:
    monkeypatch.setattr(tables, "product_speed", lambda *given: speed)
    monkeypatch.setattr(tables, "native", lambda device: Precision("float32", "a test"))
    monkeypatch.setattr(tables.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    assert f"up to about {billions} billion parameters on a million tokens" in tables.prospects()


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    line = ("plan", request_for(tmp_path).model, "--r", 8, "--batch-size", 2, "--max-length", 16)
    shown = call(*line, "--gpu", "4090")
    assert "peak of a training step" in shown
    assert "It fits" in shown
    values = json.loads(call(*line, "--json"))
    assert values["fits"] is True
    assert values["needed"] == max(values["step"], values["initialization"])
    assert values["changes"] == {}
    with pytest.raises(ValueError, match="--bits must be 4 or 16, got 8"):
        call(*line, "--bits", 8)
    with pytest.raises(ValueError, match=r"cannot read the config of .*, expected a folder or hub id"):
        call("plan", tmp_path / "nothing")


def a_run(name: str = "float32", **values: Any) -> Any:
    rows = [Encoded((1,) * 20, (2,) * 5)] * 64
    held_out = SimpleNamespace(examples=[None] * 3)
    counts = {"steps": 125, "tokens": 50_000, "epochs": values.get("epochs", 1.0), "held_out": held_out}
    return SimpleNamespace(
        settings=replace(Settings(), **values), precision=Precision(name, ""), rows=rows, batch_size=16, **counts
    )


def test_lines_say_steps_and_tokens_then_time_and_memory() -> None:
    length = "64 examples (3 held out), 125 steps of 16, 50,000 tokens"
    assert train.announcement(a_run(data="a.jsonl")) == f"Training on the CPU in float32: {length}"
    task = "word_sequence_reversal (a generated task: no --data)"
    assert train.announcement(a_run()) == f"Training {task} on the CPU in float32: {length}"
    again = a_run(data="a.jsonl")
    again.epochs = 15.0
    assert "125 steps of 16 (15 passes, --epochs auto), 50,000" in train.announcement(again)
    (line,) = train.estimated(a_run(), 260, 2_100_000_000)
    assert line == "Estimate from the first steps: about 4 min and 2.1 GB"


def test_the_first_step_is_slower_the_longest_needs_more_and_a_peak_before_says_nothing() -> None:
    found = train.estimate([(9.0, 100), (2.0, 200)], 10_000, 400, (10**9, 2 * 10**9))
    assert found == (pytest.approx(100), 3 * 10**9)
    # tokenizing a line of 8 MB took 5 GB, from which 69 GB were estimated for training
    for before, memory in ((5_000, 5_000), (4_999, 1_000 + 4_000 * 80)):
        assert train.estimate([(1.0, 100)], 100, 8000, (1_000, 5_000), peak_before=before)[1] == memory


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, "--epochs 0.5 (half of the steps)"),
        ({"data": "x", "epochs": 6.0}, "--epochs 1"),
        ({"name": "bfloat16"}, r"--dtype auto (float32 here)"),
        ({"max_length": 10}, "--max-length 5"),
    ],
)
def test_a_long_run_is_told_what_costs_most(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], want: str) -> None:
    monkeypatch.setattr(train, "native", lambda: Precision("float32", ""))
    monkeypatch.setattr(train, "slowdown", lambda dtype: 40.0)
    run = a_run(**values)
    first, second = train.estimated(run, 3 * 3600, 10**9)
    assert "about 3.0 h" in first
    assert second.startswith(f"That is long, and {want}")
    name, saved = train.costliest(run, 3 * 3600)
    assert name == want
    assert 0 < saved < 3 * 3600
