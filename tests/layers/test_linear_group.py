"""q/k/v and gate/up in one call: launches, equality with single layers, and every reason to stay alone."""

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
from models import batches_for, logits, make, patched
from torch import Tensor, nn

import lorasb
from lorasb.kernels.launcher import observed
from lorasb.layers import linear_group as siblings
from lorasb.layers.linear import LoRASBLinear

GROUPS = {"llama": [3, 2], "gemma2": [3, 2], "roberta": [3], "gpt2": []}


def step(model: nn.Module, family: str = "llama", backend: str = "eager") -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every R."""
    model.zero_grad()
    with lorasb.backend(backend):
        out = model(**batches_for(family, count=1)[0])
        out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if "lorasb_R" in n}


def groups(model: nn.Module) -> list[siblings.Siblings]:
    found = {id(m.siblings): m.siblings for m in model.modules() if isinstance(m, LoRASBLinear) and m.siblings}
    return list(found.values())


def alone(model: nn.Module) -> nn.Module:
    """The same model without groups."""
    model = copy.deepcopy(model)
    siblings.dissolve(model)
    return model


def same(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    tolerances.check(first[0], second[0], tolerances.PROCESS_SUMS)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        tolerances.check(gradient, second[1][name], tolerances.PROCESS_SUMS)


@pytest.mark.parametrize("family", GROUPS)
def test_patching_finds_them(family: str) -> None:
    model = patched(family)
    sizes = [len(group.members) for group in groups(model)]
    assert sizes == GROUPS[family] * 2
    if family != "gpt2":
        same(step(model, family), step(alone(model), family))
        assert [len(group.members) for group in groups(model)] == sizes


def test_a_llama_block_takes_eight_launches() -> None:
    model = patched("llama", target_modules="all-linear")
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 20, 64, requires_grad=True)
    rotary = model.base_model.model.model.rotary_emb(x, torch.arange(20)[None])
    counts, results = {}, {}
    for name, one in (("grouped", block), ("alone", alone(block))):
        with lorasb.backend("triton"), observed() as launches:
            y = one(x, position_embeddings=rotary)
            forward = len(launches)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        counts[name] = forward, len(launches) - forward
        results[name] = y.detach(), gradient
    assert counts == {"grouped": (8, 8), "alone": (14, 14)}
    for got, want in zip(*results.values(), strict=True):
        tolerances.check(got, want, tolerances.fp32(1000))


def test_the_whole_model_by_the_kernels() -> None:
    model = patched("llama")
    same(step(model, backend="triton"), step(alone(model)))


@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding_is_grouped(tokens: int) -> None:
    model = patched("llama").eval()
    ids = torch.randint(3, 99, (1, tokens))
    with torch.no_grad(), lorasb.backend("triton"), observed() as launches:
        got = model(input_ids=ids).logits
    assert len(launches) == 2 * 8
    with torch.no_grad():
        tolerances.check(got, alone(model)(input_ids=ids).logits, tolerances.PROCESS_SUMS)


def attention(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0].self_attn


class TestStaysAlone:
    def test_a_layer_that_gets_another_tensor_leaves(self) -> None:
        model = patched("llama")
        part = attention(model)
        part.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
        want = step(alone(model))
        same(step(model), want)

    def test_splits_by_what_was_read(self) -> None:
        """A cross-attention: q reads one tensor, k and v another."""

        class Cross(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor, memory: Tensor) -> Tensor:
                return self.q_proj(x) + self.k_proj(memory) + self.v_proj(memory)

        model = prepared(Cross(), 16)
        cross = model.base_model.model
        x, memory = torch.randn(3, 16), torch.randn(3, 16)
        want = alone(cross)(x, memory)
        for _ in range(3):
            tolerances.check(cross(x, memory), want, tolerances.fp32(16))
        assert [len(group.members) for group in groups(model)] == [2]
        assert cross.q_proj.siblings is None
        assert cross.k_proj.siblings is cross.v_proj.siblings

    def test_a_tensor_changed_in_place_is_another(self) -> None:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate_proj, self.up_proj = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                gate = self.gate_proj(x)
                x.mul_(2.0)
                return gate + self.up_proj(x)

        model = prepared(Changing(), 16)
        x = torch.randn(3, 16)
        want = alone(model.base_model.model)(x.clone())
        tolerances.check(model.base_model.model(x.clone()), want, tolerances.fp32(16))
        assert groups(model) == []

    def test_a_layer_that_is_skipped_leaves(self) -> None:
        class Skipping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.q_proj(x) + self.v_proj(x)

        model = prepared(Skipping(), 16)
        x = torch.randn(3, 16)
        want = alone(model.base_model.model)(x)
        for _ in range(2):
            tolerances.check(model.base_model.model(x), want, tolerances.fp32(16))
        assert [len(group.members) for group in groups(model)] == [2]

    @pytest.mark.parametrize(
        "case", ["disabled", "merged", "another adapter", "dropout", "hook", "other rank", "inference"]
    )
    def test_otherwise(self, case: str) -> None:
        model = patched(
            "llama",
            **({"lora_dropout": 0.5} if case == "dropout" else {}),
            **({"rank_pattern": {"k_proj": 2}} if case == "other rank" else {}),
        )
        apart = alone(model)
        for one in (model, apart):
            prepare(one, case)
        with torch.inference_mode(case == "inference"), lorasb.backend("triton"), observed() as launches:
            torch.manual_seed(0)
            got = model(**batches_for("llama", count=1)[0]).logits
            count = len(launches)
            torch.manual_seed(0)
            want = apart(**batches_for("llama", count=1)[0]).logits
        tolerances.check(got, want, tolerances.EXACT if case == "dropout" else tolerances.PROCESS_SUMS)
        expected = {"disabled": 0, "merged": 0, "another adapter": 16, "other rank": 20, "hook": 24}
        assert count == expected.get(case, 28)

    def test_called_outside_of_its_parent(self) -> None:
        model = patched("llama")
        x = torch.randn(2, 64)
        part = attention(model)
        y = part.q_proj(x)
        assert part.q_proj.siblings._pending is None
        assert torch.equal(y, alone(model).base_model.model.model.layers[0].self_attn.q_proj(x))


def prepare(model: nn.Module, case: str) -> None:
    model.eval()
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    elif case == "merged":
        model.merge_adapter()
    elif case == "another adapter":
        torch.manual_seed(1)
        model.add_adapter("other", lorasb.LoRASBConfig(r=4))
        model.set_adapter("other")
        lorasb.initialize(model, batches_for("llama"), lr=3e-2, progress=False)
    elif case == "dropout":
        model.train()
    elif case == "hook":
        for layer in model.base_model.model.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda *_: None)
            layer.mlp.up_proj.register_forward_hook(lambda *_: None)


def prepared(module: nn.Module, features: int) -> nn.Module:
    """A module's linears adapted, with factors that do something."""
    model = lorasb.patch(module, r=3, target_modules="all-linear")
    for layer in model.modules():
        if isinstance(layer, LoRASBLinear):
            q = torch.linalg.qr(torch.randn(features, 3)).Q
            layer.set_factors("default", q, torch.randn(3, 3), q.t())
    return model


class Two(nn.Module):
    """A parent of two siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.raises: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x)
        if self.raises is not None:
            raise self.raises
        return y + self.k_proj(x)


class TestLifetime:
    def test_no_result_outlives_the_parents_forward(self) -> None:
        model = patched("llama")
        step(model)
        for group in groups(model):
            assert group._pending is None
            assert group._context is None

    def test_nor_when_the_parent_raises(self) -> None:
        model = prepared(Two(), 16)
        model.base_model.model.raises = ArithmeticError
        (group,) = groups(model)
        x = torch.randn(3, 16)
        with pytest.raises(ArithmeticError):
            model.base_model.model(x)
        assert group._pending is None
        assert group._context is None
        model.base_model.model.raises = None
        model.base_model.model(x)
        assert groups(model) == [group]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, reentrant: bool) -> None:
        model = patched("llama")
        want = step(model)
        model.train()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        same(step(model), want)
        for group in groups(model):
            assert group._pending is None
            assert group._context is None
        assert [len(group.members) for group in groups(model)] == [3, 2, 3, 2]

    def test_a_copied_model_has_groups_of_its_own(self) -> None:
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

    def test_unloading_leaves_the_model_as_it_was(self) -> None:
        base = make("llama")
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()}
        unloaded = lorasb.patch(base, r=4).unload()
        assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unloaded.named_modules()} == hooks

    def test_a_dropped_block_is_freed_at_once(self) -> None:
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

    def test_a_layer_copied_alone_belongs_to_nobody(self) -> None:
        model = patched("llama")
        part = attention(model)
        copied = copy.deepcopy(part.q_proj)
        assert copied.siblings is None
        assert part.q_proj.siblings is part.k_proj.siblings is not None

    def test_a_pickled_model_computes_alone(self) -> None:
        block = prepared(Two(), 16).base_model.model
        loaded = pickle.loads(pickle.dumps(block))
        x = torch.randn(3, 16)
        tolerances.check(loaded(x), block(x), tolerances.fp32(16))

    def test_groups_formed_anew_hold_nothing_outside_of_the_parent(self) -> None:
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

    def test_after_an_interrupted_forward_nothing_stale_is_taken(self) -> None:
        block = prepared(Two(), 16).base_model.model
        x = torch.randn(3, 16)
        block.raises = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            block(x)
        block.raises = None
        with torch.no_grad():
            block.k_proj.lorasb_R["default"].mul_(100.0)
        tolerances.check(block(x), alone(block)(x), tolerances.fp32(16))
        assert block.q_proj.siblings._pending is None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_inside_the_parent(self, reentrant: bool) -> None:
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

    def test_another_thread_computes_for_itself(self) -> None:
        block = prepared(Two(), 16).base_model.model
        x = torch.randn(3, 16)
        with ThreadPoolExecutor(1) as pool:
            group = block.q_proj.siblings
            group._parent_begins(block, ())
            assert group.take(block.q_proj, x) is not None
            assert pool.submit(group.take, block.k_proj, x).result() is None
            group._parent_ends(block, (), None)

    def test_compiles_without_a_graph_break(self) -> None:
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
