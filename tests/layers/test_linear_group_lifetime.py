"""What a group holds and for how long: nothing outside of its parent's forward, however that ends; u for backward."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import tolerances
import torch
import torch.utils.checkpoint
from linear_groups import Two, alone, attention, groups, prepared, same, step
from models import batches_for, logits, make, patched
from torch import Tensor, nn

import lorasb

pytestmark = pytest.mark.usefixtures("grouped")


def test_no_result_outlives_the_parents_forward() -> None:
    model = patched("llama")
    step(model)
    for group in groups(model):
        assert not group._forwards


def test_no_result_outlives_a_forward_that_raises() -> None:
    model = prepared(Two(), 16)
    model.base_model.model.raises = ArithmeticError
    (group,) = groups(model)
    x = torch.randn(3, 16)
    with pytest.raises(ArithmeticError):
        model.base_model.model(x)
    assert not group._forwards
    model.base_model.model.raises = None
    model.base_model.model(x)
    assert groups(model) == [group]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = patched("llama")
    want = step(model)
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(step(model), want)
    for group in groups(model):
        assert not group._forwards
    assert [len(group.members) for group in groups(model)] == [3, 2, 3, 2]


def test_a_copied_model_has_groups_of_its_own() -> None:
    model = patched("llama")
    other = copy.deepcopy(model)
    assert {id(g) for g in groups(model)}.isdisjoint(id(g) for g in groups(other))
    assert [len(g.members) for g in groups(other)] == [3, 2, 3, 2]
    with torch.no_grad():
        for group in groups(other):
            for member in group.members:
                member.lorasb_R["default"].mul_(3.0)
    assert not torch.equal(logits(model), logits(other))
    assert torch.equal(logits(other), logits(other))


def test_unloading_leaves_the_model_as_it_was() -> None:
    base = make("llama")
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()}
    unloaded = lorasb.patch(base, r=4).unload()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unloaded.named_modules()} == hooks


def test_a_dropped_block_is_freed_at_once() -> None:
    """Without the garbage collector: `del model; torch.cuda.empty_cache()` gives the memory back."""
    block = Two()
    model = prepared(block, 16)
    model.base_model.model = None
    block(torch.randn(2, 16))
    layer = weakref.ref(block.q_proj)
    gc.disable()
    try:
        del block
        assert layer() is None
    finally:
        gc.enable()


def test_a_layer_copied_alone_belongs_to_nobody() -> None:
    model = patched("llama")
    part = attention(model)
    copied = copy.deepcopy(part.q_proj)
    assert copied.siblings is None
    assert part.q_proj.siblings is part.k_proj.siblings is not None


def test_a_pickled_model_computes_alone() -> None:
    block = prepared(Two(), 16).base_model.model
    loaded = pickle.loads(pickle.dumps(block))
    x = torch.randn(3, 16)
    tolerances.check(loaded(x), block(x), tolerances.fp32(16))


def test_groups_formed_anew_hold_nothing_outside_of_the_parent() -> None:
    """A group that was split at the end of a forward must not think that it is still inside."""

    class Skipping(Two):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + self.v_proj(x)

    block = prepared(Skipping(), 16).base_model.model
    x = torch.randn(3, 16)
    block(x)
    block.q_proj(x)
    with torch.no_grad():
        block.v_proj.lorasb_R["default"].mul_(100.0)
    want = alone(block).v_proj(x)
    tolerances.check(block.v_proj(x), want, tolerances.fp32(16))


def test_after_an_interrupted_forward_nothing_stale_is_taken() -> None:
    block = prepared(Two(), 16).base_model.model
    x = torch.randn(3, 16)
    block.raises = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        block(x)
    block.raises = None
    with torch.no_grad():
        block.k_proj.lorasb_R["default"].mul_(100.0)
    tolerances.check(block(x), alone(block)(x), tolerances.fp32(16))
    assert not block.q_proj.siblings._forwards


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
    for got, want in zip(*results, strict=True):
        tolerances.check(got, want, tolerances.fp32(64))


def test_another_thread_computes_for_itself() -> None:
    block = prepared(Two(), 16).base_model.model
    x = torch.randn(3, 16)
    with ThreadPoolExecutor(1) as pool:
        group = block.q_proj.siblings
        group._parent_begins(block, ())
        assert group.take(block.q_proj, x) is not None
        assert pool.submit(group.take, block.k_proj, x).result() is None
        group._parent_ends(block, (), None)


def test_compiles_without_a_graph_break() -> None:
    model = patched("llama").eval()
    batch = batches_for("llama", count=1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        tolerances.check(compiled(**batch).logits, model(**batch).logits, tolerances.PROCESS_SUMS)


def test_memory_kept_for_backward_is_u_alone() -> None:
    model = patched("llama")
    part = attention(model)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(40, 64, requires_grad=True)
    weights = {p.data_ptr() for p in part.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    group = part.q_proj.siblings
    group._parent_begins(part, ())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        part.q_proj(x), part.k_proj(x), part.v_proj(x)
    group._parent_ends(part, (), ())
    assert kept == [(40, 4)] * 3


def test_a_forward_that_a_thread_was_interrupted_in_is_forgotten() -> None:
    """Ctrl-C skips hooks that see every other end of a forward."""
    model = prepared(Two(), 16)
    (group,), two, x = groups(model), model.base_model.model, torch.randn(3, 16)
    two.raises = KeyboardInterrupt
    with ThreadPoolExecutor(1) as thread, pytest.raises(KeyboardInterrupt):
        thread.submit(two, x).result()
    assert len(group._forwards) == 1
    two.raises = None
    two(x)
    assert not group._forwards


def test_a_group_that_is_split_at_the_end_of_a_forward_is_outside_of_it() -> None:
    model = prepared(Skipping(), 16)
    skipping, x = model.base_model.model, torch.randn(3, 16)
    skipping(x)
    (group,) = groups(model)
    assert not group._forwards
    skipping.q_proj(x)
    assert not group._forwards


class Skipping(nn.Module):
    """A parent that never calls one of three siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.v_proj(x)
