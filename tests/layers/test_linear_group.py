"""q/k/v and gate/up in one call: launches, equality with single layers, reasons to stay alone, lifetime of results."""

import copy
import gc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import tolerances
import torch
import torch.utils.checkpoint
from adapters import layers
from basis_models import fill, with_users
from linear_groups import Two, alone, attention, groups, prepared, same, sizes, step
from measuring import saved_for_backward
from models import batches_for, logits, make, patched
from torch import Tensor, nn

import lorasb
from lorasb.kernels.launcher import observed
from lorasb.layers import linear, linear_group

pytestmark = pytest.mark.usefixtures("grouped")

FIRST = {"layers_to_transform": [0]}  # one block of two, as interpreted kernels are slow
GROUPS = {"llama": [3, 2], "gemma2": [3, 2], "roberta": [3], "gpt2": []}


@pytest.mark.parametrize("family", GROUPS)
def test_patching_finds_the_groups_and_they_compute_what_single_layers_do(family: str) -> None:
    model = patched(family)
    assert sizes(model) == GROUPS[family] * 2
    same(step(model, family), step(alone(model), family))
    assert sizes(model) == GROUPS[family] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_llama_block_takes_eight_launches_and_each_member_has_the_mask_that_it_has_alone(dropout: float) -> None:
    model = patched("llama", lora_dropout=dropout, **FIRST).train()
    x, found = torch.randn(2, 12, 64, requires_grad=True), []
    rotary = model.base_model.model.model.rotary_emb(x, torch.arange(12)[None])
    for one in (model, alone(model)):
        torch.manual_seed(0)
        with lorasb.backend("triton"), observed() as launches:
            y = one.base_model.model.model.layers[0](x, position_embeddings=rotary)
            forward = len(launches)
            cores = [p for p in one.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(y.square().sum(), (x, *cores))
        found.append((y.detach(), *gradients))
        assert (forward, len(launches) - forward) == ((8, 8) if one is model else (14, 14))
    sums = tolerances.fp32(1000)
    bounds = [tolerances.EXACT if dropout else sums, sums, *[tolerances.PROCESS_SUMS] * len(cores)]
    for got, want, bound in zip(*found, bounds, strict=True):
        tolerances.check(got, want, bound)


def test_dropout_of_a_group_acts_in_training_only() -> None:
    model = patched("llama", lora_dropout=0.5)
    want = logits(alone(model).eval())
    tolerances.check(logits(model.eval()), want, tolerances.fp32(100))
    assert (logits(model.train()) - want).abs().max() > 1e-3
    assert sizes(model) == [3, 2] * 2


def test_a_group_splits_by_what_its_layers_read() -> None:
    model = prepared(Cross(), 16)
    cross = model.base_model.model
    x, memory = torch.randn(3, 16), torch.randn(3, 16)
    want = alone(cross)(x, memory)
    for _ in range(3):
        tolerances.check(cross(x, memory), want, tolerances.fp32(16))
    assert sizes(model) == [2]
    assert groups(model)[0].names == ("k_proj", "v_proj")


def test_a_tensor_changed_in_place_is_another() -> None:
    class Changing(Two):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            x.mul_(2.0)
            return q + self.k_proj(x)

    model = prepared(Changing(), 16)
    x = torch.randn(3, 16)
    want = alone(model.base_model.model)(x.clone())
    for _ in range(2):
        tolerances.check(model.base_model.model(x.clone()), want, tolerances.fp32(16))
    assert sizes(model) == []


def test_a_layer_that_is_skipped_leaves_and_the_group_that_is_left_is_outside_of_the_forward() -> None:
    model = prepared(Skipping(), 16)
    skipping, x = model.base_model.model, torch.randn(3, 16)
    want = alone(skipping)(x)
    for _ in range(2):
        tolerances.check(skipping(x), want, tolerances.fp32(16))
    (group,) = groups(model)
    assert group.names == ("q_proj", "v_proj")
    assert not vars(group._thread)
    skipping.q_proj(x)
    assert not vars(group._thread)
    with torch.no_grad():
        skipping.v_proj.lorasb_R["default"].mul_(100.0)
    tolerances.check(skipping.v_proj(x), alone(skipping).v_proj(x), tolerances.fp32(16))


@pytest.mark.parametrize(
    "case",
    [
        *("decoding", "disabled", "merged", "another adapter", "two adapters"),
        *("hook", "pre-hook", "other rank", "inference"),
    ],
)
def test_states_of_which_some_keep_layers_alone_compute_the_same(case: str) -> None:
    model = patched("llama", **FIRST, **({"rank_pattern": {"k_proj": 2}} if case == "other rank" else {}))
    apart = alone(model)
    for one in (model, apart):
        prepare(one, case)
    batch = batches_for("llama", 1, tokens=1 if case == "decoding" else 4)[0]
    with torch.set_grad_enabled(case != "decoding"), torch.inference_mode(case == "inference"):
        with lorasb.backend("triton"), observed() as launches:
            got = model(**batch).logits
        tolerances.check(got, apart(**batch).logits, tolerances.PROCESS_SUMS)
    expected = {
        "decoding": 8,
        "disabled": 0,
        "merged": 0,
        "another adapter": 8,
        "other rank": 10,
        "hook": 12,
        "pre-hook": 12,
        "two adapters": 28,
    }
    assert len(launches) == expected.get(case, 14)


def prepare(model: nn.Module, case: str) -> None:
    model.eval()
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    elif case == "merged":
        model.merge_adapter()
    elif case in ("another adapter", "two adapters"):
        model.add_adapter("other", lorasb.LoRASBConfig(r=4, init="random", **FIRST))
        fill(model, "other", 1)
        model.base_model.set_adapter("other" if case == "another adapter" else ["default", "other"])
    elif case == "hook":
        for layer in model.base_model.model.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda *_: None)
            layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    elif case == "pre-hook":
        for layer in model.base_model.model.model.layers:
            layer.self_attn.v_proj.register_forward_pre_hook(lambda _, args: (2.0 * args[0],))
            layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: (2.0 * args[0],))


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))


class Cross(Three):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.q_proj(x).tanh() * self.k_proj(memory).tanh() + self.v_proj(memory)


class Skipping(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.v_proj(x)


def test_layers_that_read_another_input_are_separated_after_a_checkpointed_step() -> None:
    """Not during the step: backward repeats the forward, which has to save the same tensors as the first time."""
    torch.manual_seed(0)
    x, memory = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    cross = prepared(Cross(), 16)
    plain = alone(cross)
    plain(x, memory).square().sum().backward()
    want = {n: p.grad for n, p in plain.named_parameters() if "lorasb_R" in n}
    for expected in ([3], [2], [2]):
        cross.zero_grad()
        torch.utils.checkpoint.checkpoint(cross, x, memory, use_reentrant=False).square().sum().backward()
        for name, gradient in want.items():
            tolerances.check(cross.get_parameter(name).grad, gradient, tolerances.PROCESS_SUMS)
        assert sizes(cross) == expected


@pytest.mark.parametrize(
    ("group", "gpu", "formed"), [(None, False, 0), (None, True, 4), (True, False, 4), (False, True, 0)]
)
def test_groups_are_formed(group: bool | None, gpu: bool, formed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the `grouped` fixture
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = lorasb.patch(make("llama"), r=4, target_modules="all-linear", group=group)
    assert len(groups(model)) == formed
    config = model.peft_config["default"].to_dict()
    assert config["group"] is group  # as given, and not saved, as machines differ
    model.add_adapter("second", lorasb.LoRASBConfig(r=3, target_modules="all-linear", group=None))
    assert len(groups(model)) == formed


def test_a_wide_adapter_separates_layers_while_it_is_active() -> None:
    model = patched("llama", **FIRST)
    model.add_adapter("wide", lorasb.LoRASBConfig(r=3, wide_factors=True, init="kaiming", **FIRST))
    for name, is_alone in (("wide", True), ("default", False)):
        model.set_adapter(name)
        key = linear_group.group_key(attention(model).q_proj, torch.randn(3, 64))
        assert (key is None) == is_alone


NAMES = ["default", "one", "__base__", "two"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.long)])
def test_values_and_gradients_by_row_are_those_of_the_layers_alone(backend: str) -> None:
    model = with_users("one", "two", target_modules="all-linear")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lorasb_R" in name)
    results = [step(one, backend=backend, rows=4, tokens=3, adapter_names=NAMES) for one in (model, alone(model))]
    same(*results)
    assert len(results[0][1]) == 2 * 7 * 3
    assert sizes(model) == [3, 2] * 2


def launches_of(model: nn.Module, names: list[str] = NAMES) -> Counter[str]:
    ids = torch.randint(3, 99, (len(names), 3))
    with torch.no_grad(), lorasb.backend("triton"), observed() as launches:
        model(input_ids=ids, adapter_names=names)
    return Counter(one.name for one in launches)


def test_a_bank_s_rows_are_grouped_too() -> None:
    model = with_users(**FIRST)
    bank = lorasb.AdapterBank(model)
    for name in ("one", "two"):
        bank.add(name, {n: torch.randn_like(layer.lorasb_R["default"]) for n, layer in bank.layers.items()})
    names = ["one", "__base__", "two", "one"]
    assert launches_of(model, names) == {"prep_forward": 4, "extended_gemm": 4, "times_row_cores": 7}
    assert launches_of(alone(model), names) == {"prep_forward": 7, "extended_gemm": 7, "times_row_cores": 7}


def test_what_is_computed_in_several_calls_stays_alone() -> None:
    model = with_users("one", "two", **FIRST)
    model.add_adapter("apart", lorasb.LoRASBConfig(r=3, init="kaiming", **FIRST))
    assert not launches_of(model, ["one", "apart", "two", "one"])["times_row_cores"]  # adapters run one after another
    model.base_model.model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *_: None)
    assert launches_of(model)["extended_gemm"] == 4 + 1


class Several(Two):
    def forward(self, x: Tensor, first: list[str], second: list[str]) -> Tensor:
        return self.q_proj(x, adapter_names=first) + self.k_proj(x, adapter_names=second)


class Writing(Several):
    """Writes to an R between its members."""

    def forward(self, x: Tensor, first: list[str], second: list[str]) -> Tensor:
        y = self.q_proj(x, adapter_names=first)
        with torch.no_grad():
            self.k_proj.lorasb_R["two"].mul_(2.0)
        return y + self.k_proj(x, adapter_names=second)


def several(kind: type[Several] = Several) -> nn.Module:
    model: Any = prepared(kind(), 16)
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(name, lorasb.LoRASBConfig(basis="default"))
        fill(model, name, seed)
    return model.base_model.model


def test_members_with_other_rows_are_computed_with_theirs() -> None:
    x, first = torch.randn(3, 16), ["one", "two", "one"]
    others = ["one", "one", "two"], ["one", "default", "one"]  # the same names, or the same places
    for second in (list(first), *others):
        model = several()
        want = alone(model)(x, first, second)
        for _ in range(2):
            tolerances.check(model(x, first, second), want, tolerances.fp32(16))
        assert sizes(model) == ([2] if second == first else [])


def test_an_r_that_is_written_to_between_members_is_read_again() -> None:
    model, x, names = several(Writing), torch.randn(3, 16), ["one", "two", "default"]
    want = alone(model)(x, names, names)
    tolerances.check(model(x, names, names), want, tolerances.fp32(16))


def test_one_that_is_not_initialized_raises_where_it_would_be_trained() -> None:
    model: Any = lorasb.patch(Several(), r=3, target_modules="all-linear").train()
    x = torch.randn(2, 16)
    layer = model.base_model.model.q_proj
    model.add_adapter("one", lorasb.LoRASBConfig(r=3, target_modules="all-linear"))
    layer.lorasb_A["one"], layer.lorasb_B["one"] = layer.lorasb_A["default"], layer.lorasb_B["default"]
    assert linear.on_one_basis(layer, ["default", "one"])
    with pytest.raises(RuntimeError, match="has not been initialized"):
        model.base_model.model(x, ["default", "one"], ["default", "one"])


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_nothing_for_a_later_one(error: type[BaseException], elsewhere: bool) -> None:
    """Ctrl-C skips the hooks that see every other end of a forward, in this thread or another."""
    block, x = prepared(Two(), 16).base_model.model, torch.randn(3, 16)
    (group,), block.raises = groups(block), error
    with ThreadPoolExecutor(1) as thread, pytest.raises(error):
        thread.submit(block, x).result() if elsewhere else block(x)
    assert bool(vars(group._thread)) == (error is KeyboardInterrupt and not elsewhere)
    block.raises = None
    with torch.no_grad():
        block.k_proj.lorasb_R["default"].mul_(100.0)
    tolerances.check(block(x), alone(block)(x), tolerances.fp32(16))
    assert not vars(group._thread)
    assert sizes(block) == [2]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = patched("llama")
    want = step(model)
    assert not any(vars(group._thread) for group in groups(model))
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(step(model), want)
    assert not any(vars(group._thread) for group in groups(model))
    assert sizes(model) == [3, 2, 3, 2]


def test_a_copied_model_has_groups_of_its_own() -> None:
    model = patched("llama")
    part = attention(model)
    layer, x = copy.deepcopy(part.q_proj), torch.randn(2, 64)
    assert groups(layer)[0] is not groups(part)[0]
    assert torch.equal(layer(x), part.q_proj(x))
    other = copy.deepcopy(model)
    assert {id(g) for g in groups(model)}.isdisjoint(id(g) for g in groups(other))
    assert sizes(other) == [3, 2, 3, 2]
    with torch.no_grad():
        for layer in layers(other).values():
            layer.lorasb_R["default"].mul_(3.0)
    assert not torch.equal(logits(model), logits(other))
    assert torch.equal(logits(other), logits(other))


def test_unloading_leaves_the_model_as_it_was() -> None:
    base = make("llama")
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()}
    unloaded = lorasb.patch(base, r=4).unload()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unloaded.named_modules()} == hooks


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_dropped_block_is_freed_at_once(error: type[BaseException] | None) -> None:
    """Without the garbage collector: `del model; torch.cuda.empty_cache()` gives the memory back."""
    block = Two()
    model = prepared(block, 16)
    model.base_model.model = None
    block.raises = error
    with suppress(KeyboardInterrupt):
        block(torch.randn(2, 16))
    kept, dropped = block.q_proj, weakref.ref(block.k_proj)
    gc.disable()
    try:
        del block
        assert dropped() is None
        kept(torch.randn(2, 16))
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_parent_gives_the_same_gradients(reentrant: bool) -> None:
    class Inner(Two):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)

    block = prepared(Inner(), 16).base_model.model
    results = []
    for one in (block, alone(block)):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one(x).square().sum().backward()
        results.append((x.grad, one.q_proj.lorasb_R["default"].grad))
    tolerances.check(*results, tolerances.fp32(64))


def test_compiles_without_a_graph_break() -> None:
    model = patched("llama").eval()
    block, x = model.base_model.model.model.layers[0], torch.randn(2, 12, 64)
    rotary = model.base_model.model.model.rotary_emb(x, torch.arange(12)[None])
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = (run(x, position_embeddings=rotary) for run in (compiled, block))
    tolerances.check(got, want, tolerances.PROCESS_SUMS)


def test_memory_kept_for_backward_is_u_alone() -> None:
    model = patched("llama")
    part = attention(model)
    x, (group,) = torch.randn(40, 64, requires_grad=True), groups(part)
    group.begins(part, ())
    with saved_for_backward(part.parameters()) as kept:
        part.q_proj(x), part.k_proj(x), part.v_proj(x)
    group.ends(part, (), ())
    assert [tuple(tensor.shape) for tensor in kept] == [(40, 4)] * 3
