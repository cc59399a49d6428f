"""Layer by layer or pass by pass: plain autograd's sums to the bit, and which strategy is taken when."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import tolerances
import torch
import transformers
from conftest import Batch, batches_for, make, text
from gradients import autograd_sums, factors, library_sums
from torch import Tensor, nn

import lorasb
from lorasb.init import accumulator, layerwise
from lorasb.init.accumulate import passes
from lorasb.init.blocks import NotAStackError, Traversal, find_stack
from lorasb.linear import LoRASBLinear

FAMILIES = ["llama", "mistral", "gemma2", "qwen3", "phi3", "roberta", "gpt2"]


def singles(family: str, count: int = 3) -> list[Batch]:
    """Micro-batches of one sample of unequal lengths, some padded."""
    lengths = (12, 7, 9, 5)
    found = [{k: v[:1] for k, v in batches_for(family, 1, 1, lengths[i])[0].items()} for i in range(count)]
    if family != "roberta":
        ids = found[1]["input_ids"]
        found[1] = {
            "input_ids": nn.functional.pad(ids, (0, 4)),
            "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, 4)),
            "labels": nn.functional.pad(found[1]["labels"], (0, 4), value=-100),
        }
    return found


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_plain_autograds_to_the_bit(family: str, strategy: str) -> None:
    want = autograd_sums(family, singles(family))
    got, report = library_sums(family, singles(family), strategy=strategy)
    assert report.strategy == strategy
    assert len(got) == len(report.layers) >= 8
    for name, gradient in got.items():
        expected = want[name].t() if family == "gpt2" else want[name]
        assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_batch_takes_the_signs_without_a_sum(family: str) -> None:
    """dy and x are kept where they are smaller than their product; the report is the same."""
    batch = [{key: value[:1, :6] for key, value in batches_for(family)[0].items()}]
    reports = []
    for strategy in ("layerwise", "accumulate"):
        model = lorasb.patch(make(family), r=4)
        reports.append((lorasb.initialize(model, batch, lr=1e-3, strategy=strategy, progress=False), factors(model)))
    (ours, a), (theirs, b) = reports
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.energy_grad == pytest.approx(other.energy_grad, abs=1e-5)
        assert mine.zeros == other.zeros


@pytest.mark.parametrize("room", ["1KB", "250KB", "10GB"])
def test_as_many_passes_as_the_budget_asks_for_give_the_same(room: str) -> None:
    got, report = library_sums("llama", singles("llama"), strategy="accumulate", memory_budget=room)
    want = autograd_sums("llama", singles("llama"))
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())
    assert ("14 passes" in report.why) == (room == "1KB")
    assert ("1 passes" in report.why) == (room == "10GB")


def test_passes_go_from_the_last_layer_to_the_first_and_fill_the_room() -> None:
    layers = {str(i): nn.Linear(8, 8) for i in range(5)}
    assert [list(part) for part in passes(layers, 4 * 64 * 2)] == [["4", "3"], ["2", "1"], ["0"]]
    assert [len(part) for part in passes(layers, 0)] == [1] * 5


def test_blocks_without_targets_are_passed_through() -> None:
    want = autograd_sums("llama", singles("llama"))
    for chosen in ([0], [1]):
        model = lorasb.patch(make("llama"), r=3, target_modules=["q_proj"], layers_to_transform=chosen)
        got, _ = library_sums(model, singles("llama"), strategy="layerwise")
        assert list(got) == [f"model.layers.{chosen[0]}.self_attn.q_proj"]
        assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())


def test_an_encoder_decoder_is_a_stack_and_a_pass() -> None:
    """Blocks of T5 share a bias that no target decides; the encoder's layers take a pass through the whole model."""
    batches = [text(1, 8, seed) for seed in range(2)]
    want = autograd_sums("t5", batches)
    for strategy in ("auto", "accumulate"):
        got, report = library_sums(lorasb.patch(make("t5"), r=3), batches, strategy=strategy)
        assert report.strategy == ("layerwise" if strategy == "auto" else "accumulate")
        assert {name.partition(".")[0] for name in got} == {"encoder", "decoder"}
        for name, gradient in got.items():  # the encoder's output gathers its gradients in another order
            scale = want[name].abs().max()
            tolerances.check(gradient / scale, want[name] / scale, tolerances.BATCHING)


def test_the_router_of_a_mixture_has_a_loss_of_its_own() -> None:
    """transformers catches router logits by hooks: a gradient comes to hidden states that no block returns."""
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, num_local_experts=4, pad_token_id=0, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    batches = [text(1, 8, seed) for seed in range(2)]
    for aux in (True, False):
        config.output_router_logits = aux
        torch.manual_seed(0)
        plain = transformers.MixtralForCausalLM(config).eval()
        model = lorasb.patch(copy.deepcopy(plain), r=3, target_modules=["q_proj", "o_proj"])
        for batch in batches:
            plain(**batch).loss.backward()
        got, report = library_sums(model, batches)
        assert report.strategy == ("accumulate" if aux else "layerwise")
        for name, gradient in got.items():
            assert torch.equal(gradient, plain.get_submodule(name).weight.grad), name


class Chain(nn.Module):
    """Blocks one after another, with one of the ways in which a model is no plain stack."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.head = nn.Linear(40, 40), nn.Linear(40, 40)
        self.layers = nn.ModuleList(Block(kind) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of the last block's output, and of whatever the kind adds."""
        between, aux, start = [], 0.0, self.stem(x)
        x, shared = start, {} if self.kind == "shared" else None
        for i in ORDERS.get(self.kind, [0, 1, 2]):
            if self.kind == "first" and between:
                shared = between[0]
            x = self.layers[i](x, shared) if self.kind in ("shared", "first") else self.layers[i](x)
            between.append(x)
            if self.kind == "mixed":
                x = x * 1.5
            if self.kind == "in place between":
                x *= 1.5
            if self.kind == "side":
                aux = aux + x.square().mean()
            if self.kind == "own loss":
                aux = aux + self.layers[i].loss
        if self.kind == "deep":
            x = x + between[0]
        if self.kind == "skip":
            x = x + start
        return {"loss": (self.head(x).square().mean(-1) - labels).square().mean() + aux}


class Block(nn.Module):
    """A residual linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(40, 40)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        """x + tanh(x Wᵀ + b)."""
        if self.kind == "in place":
            x *= 1.5
        if isinstance(shared, Tensor):
            x = x + 0.1 * shared
        self.loss = 0.1 * x.square().mean() if self.kind == "own loss" else 0.0
        return x + torch.tanh(self.proj(x))


ORDERS = {"twice": [0, 1, 1, 2], "order": [0, 2, 1], "loop": [0, 1, 2, 0, 1, 2]}
STACKS = ("plain", "skip")
NO_STACKS = {
    "twice": "more than once",
    "order": "block 2 runs after block 0",
    "loop": "block 0 runs more than once in a forward, on its own results",
    "mixed": "the input of block 1 is not the output of the block before",
    "deep": "the loss depends on the hidden states between blocks too",
    "side": "the loss depends on the hidden states between blocks too",
    "own loss": "the loss depends on the hidden states between blocks too",
    "first": "block 1 takes more from the blocks before than their hidden states",
    "shared": "blocks share a dict that they may write to",
    "in place": "hidden states are changed in place",
    "in place between": "hidden states are changed in place",
}


@pytest.mark.parametrize("kind", [*STACKS, *NO_STACKS])
def test_what_is_no_plain_stack_is_noticed(kind: str) -> None:
    """And layers above and below the stack are taken with it or in a pass of their own."""
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2)} for _ in range(2)]
    plain = Chain(kind)
    for batch in batches:
        x = {"x": batch["x"].clone(), "labels": batch["labels"]}
        (plain(**x)["loss"] * 2).backward()
    got, report = library_sums(lorasb.patch(Chain(kind), r=3, target_modules=["proj", "stem", "head"]), [
        {key: value.clone() for key, value in batch.items()} for batch in batches
    ], loss_fn=loss_of)  # fmt: skip
    for name, gradient in got.items():
        want, scale = plain.get_submodule(name).weight.grad, gradient.abs().max()
        if kind in ("twice", "loop"):  # autograd adds a weight's two uses before it adds them to the sum
            tolerances.check(gradient / scale, want / scale, tolerances.BATCHING)
        else:
            assert torch.equal(gradient, want), name
    assert list(got) == ["stem", "head", *(f"layers.{i}.proj" for i in range(3))]
    assert report.strategy == ("layerwise" if kind in STACKS else "accumulate")
    assert NO_STACKS.get(kind, "3 blocks at layers") in report.why


def test_a_layer_that_several_blocks_share() -> None:
    model = Chain()
    model.layers[1].proj = model.layers[0].proj
    with pytest.raises(NotAStackError, match=r"layer 'layers\.0\.proj' belongs to several blocks"):
        find_stack(model, {name: m for name, m in model.named_modules() if name.endswith("proj")})


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch)["loss"]


def test_a_loss_of_several_forwards() -> None:
    """A preference loss: two forwards that count, and one without gradients that does not."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            reference = model(**batch).loss
            assert not torch.is_grad_enabled()
        flipped = batch | {"input_ids": batch["input_ids"].flip(1)}
        return (model(**batch).loss - 0.5 * model(**flipped).loss - reference).square()

    want = autograd_sums("llama", singles("llama"), loss_fn)
    got, report = library_sums("llama", singles("llama"), strategy="layerwise", loss_fn=loss_fn)
    assert report.strategy == "layerwise"
    for name, gradient in got.items():
        scale = want[name].abs().max()
        assert (gradient - want[name]).abs().max() <= 2e-6 * scale, name


def test_under_autocast_blocks_are_computed_as_they_were() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    found = [
        library_sums("llama", singles("llama"), strategy=strategy, loss_fn=loss_fn)[0]
        for strategy in ("layerwise", "accumulate")
    ]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_the_named_list_of_blocks_is_taken() -> None:
    model = lorasb.patch(make("llama"), r=3)
    report = lorasb.initialize(model, singles("llama"), lr=1e-3, blocks="model.layers", progress=False)
    assert "2 blocks at model.layers" in report.why
    with pytest.raises(NotAStackError, match=r"the model has no list of modules 'model\.towers'"):
        lorasb.initialize(model, singles("llama"), lr=1e-3, blocks="model.towers", strategy="layerwise", progress=False)


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_checkpointing_modes_and_configs_are_left_as_found(strategy: str) -> None:
    model = lorasb.patch(make("llama"), r=4)
    lorasb.initialize(model, singles("llama"), lr=1e-3, progress=False)
    model.gradient_checkpointing_enable()
    model.train()
    model.config.use_cache = model.config.output_hidden_states = True
    before = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    state = {name: bool(value) for name, value in vars(model.config).items() if isinstance(value, bool)}
    got, _ = library_sums(model, singles("llama"), strategy=strategy)
    want = autograd_sums("llama", singles("llama"))
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == before
    assert {name: bool(value) for name, value in vars(model.config).items() if isinstance(value, bool)} == state
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, LoRASBLinear))


class Experts(nn.Module):
    """A mixture of experts: the router sends every token to the first two, and none to the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the experts that were routed to."""
        self.experts[3](x[:0])  # as loops over all experts do
        return x + sum(torch.tanh(expert(x)) for expert in self.experts[:2])


class Mixture(nn.Module):
    """Two blocks of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A squared error."""
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x.mean(-1) - labels).square().mean()}


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_experts_that_were_not_routed_to_are_named_and_start_from_their_weight(strategy: str) -> None:
    model = lorasb.patch(Mixture(), r=3, target_modules=r"layers\.\d+\.experts\.\d+")
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2)}]
    with pytest.warns(UserWarning, match=r"4 layers were not reached .* R = 0: layers\.0\.experts\.2, layers"):
        report = lorasb.initialize(model, batches, lr=1e-3, strategy=strategy, progress=False, loss_fn=loss_of)
    assert [layer.name for layer in report.layers if layer.fallback] == [
        f"layers.{i}.experts.{j}" for i in range(2) for j in (2, 3)
    ]
    idle = model.get_submodule("base_model.model.layers.1.experts.3")
    u, _, vt = torch.linalg.svd(idle.base_weight())
    a, core, b = (getattr(idle, f"lorasb_{part}")["default"] for part in "ARB")
    assert not core.any()
    assert ((b.t() @ u[:, :3]).abs() - torch.eye(3)).abs().max() < 1e-4
    assert ((a @ vt[:3].t()).abs() - torch.eye(3)).abs().max() < 1e-4
    assert idle.is_initialized("default")
    model.train()
    loss_of(model, batches[0]).backward()


def test_boundaries_may_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasb.init import strategy

    moved: list[Tensor] = []

    def keep(boundary: Tensor) -> Tensor:
        moved.append(boundary.double())
        return boundary.clone()

    monkeypatch.setattr(strategy, "_as_is", keep)
    got, _ = library_sums("llama", singles("llama"), strategy="layerwise")
    want = autograd_sums("llama", singles("llama"))
    assert len(moved) >= 6  # a boundary a block, and what blocks share beside them
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())


def test_interrupted_between_blocks_everything_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasb.init import layerwise

    model = lorasb.patch(make("llama"), r=4)
    before, flags = factors(model), [p.requires_grad for p in model.parameters()]
    plain = layerwise.block_sums

    def interrupted(work: object, stack: object, i: int, traversals: object) -> object:
        if i == 0:
            raise KeyboardInterrupt
        return plain(work, stack, i, traversals)

    monkeypatch.setattr(layerwise, "block_sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorasb.initialize(model, singles("llama"), lr=1e-3, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert not any(m.is_initialized("default") for m in model.modules() if isinstance(m, LoRASBLinear))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_an_initialised_adapter_gets_its_factors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lorasb.patch(make("llama"), r=4)
    lorasb.initialize(model, singles("llama"), lr=1e-3, progress=False)
    before, plain = factors(model), layerwise.block_sums

    def failing(work: object, stack: object, i: int, traversals: object) -> object:
        if i == 0:  # the last block is written by then
            assert not all(torch.equal(value, before[key]) for key, value in factors(model).items())
            raise RuntimeError("cut off")
        return plain(work, stack, i, traversals)

    monkeypatch.setattr(layerwise, "block_sums", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        lorasb.initialize(model, singles("llama")[1:], lr=2e-3, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert all(m.is_initialized("default") for m in model.modules() if isinstance(m, LoRASBLinear))


def test_no_more_than_one_blocks_sums_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """And boundaries go as blocks are done: memory does not grow with the number of layers."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=99, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = lorasb.patch(transformers.LlamaForCausalLM(config), r=3)
    alive: set[int] = set()
    most, plain = [0], accumulator.LayerSum.__init__

    def counted(self: accumulator.LayerSum, halves: bool = False) -> None:
        plain(self, halves)
        alive.add(id(self))
        weakref.finalize(self, alive.discard, id(self))
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(accumulator.LayerSum, "__init__", counted)
    boundaries: list[int] = []
    block_sums = layerwise.block_sums

    def watched(work: object, stack: object, i: int, traversals: list[Traversal]) -> object:
        found = block_sums(work, stack, i, traversals)
        boundaries.append(sum(hidden is not None for traversal in traversals for hidden in traversal.hidden))
        return found

    monkeypatch.setattr(layerwise, "block_sums", watched)
    lorasb.initialize(model, singles("llama"), lr=1e-3, strategy="layerwise", progress=False)
    assert most[0] == 7
    assert boundaries == [15, 12, 9, 6, 3, 0]
