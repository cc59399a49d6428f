"""Layerwise or in passes: the sums equal plain autograd's to the bit; which strategy is chosen when."""

import copy
import functools
import weakref
from collections.abc import Callable

import pytest
import torch
from adapters import layers
from gradients import autograd_sums, check_sums, factors, library_sums, padded
from models import Batch, batches_for, causal, llama, make, started
from networks import loss_of
from tolerances import BATCHING, check_equal
from torch import Tensor, nn

import lorasb
from lorasb.init import accumulator, strategies
from lorasb.init.block_recorder import NotAStackError, Traversal


def singles(family: str) -> list[Batch]:
    """Micro-batches of one sample each, with unequal lengths; some are padded."""
    found = [batches_for(family, 1, 1, length)[0] for length in (12, 7, 9)]
    if family != "roberta":
        found[1] = padded(found[1:2], 11)
    return found


@functools.cache
def plain_sums(family: str) -> dict[str, Tensor]:
    return autograd_sums(family, singles(family))


@pytest.mark.parametrize(
    ("family", "strategy"),
    [(name, "layerwise") for name in ("llama", "mistral", "gemma2", "qwen3", "phi3", "roberta", "gpt2")]
    + [(name, "accumulate") for name in ("llama", "roberta", "gpt2")],
)
def test_sums_are_plain_autograds_to_the_bit(family: str, strategy: str) -> None:
    got, report = library_sums(family, singles(family), strategy=strategy)
    assert report.strategy == strategy
    assert len(got) == len(report.layers) >= 8
    gradients = {name: gradient.t() for name, gradient in got.items()} if family == "gpt2" else got
    check_sums(gradients, plain_sums(family))


def test_the_last_blocks_of_a_long_stack_go_together_where_memory_allows() -> None:
    """Those blocks are not recomputed; the factors have the same bits as if every block were."""

    def start(**options: object) -> tuple[dict[str, Tensor], str, int]:
        torch.manual_seed(0)
        model = lorasb.patch(llama(num_hidden_layers=14).eval(), r=4)
        calls: list[int] = []
        for block in model.base_model.model.model.layers:
            block.register_forward_hook(lambda *_: calls.append(1))
        report = lorasb.initialize(model, singles("llama"), lr=1e-3, progress=False, strategy="layerwise", **options)
        return factors(model), report.why, len(calls)

    (got, why, calls), (want, plain, all_calls) = start(), start(memory_budget="700KB")
    assert "together" in why
    assert "together" not in plain
    assert calls < all_calls == 2 * 3 * 14
    check_equal(got, want)


@pytest.mark.parametrize("room", ["1KB", "250KB", "10GB"])
def test_as_many_passes_as_the_budget_asks_for_give_the_same(room: str) -> None:
    got, report = library_sums("llama", singles("llama"), strategy="accumulate", memory_budget=room)
    check_sums(got, plain_sums("llama"))
    assert ("14 passes" in report.why) == (room == "1KB")
    assert ("1 passes" in report.why) == (room == "10GB")


def test_blocks_without_targets_are_passed_through() -> None:
    for chosen in (0, 1):
        model = lorasb.patch(make("llama"), r=3, target_modules=["q_proj"], layers_to_transform=chosen)
        got, _ = library_sums(model, singles("llama"), strategy="layerwise")
        assert list(got) == [f"model.layers.{chosen}.self_attn.q_proj"]
        check_sums(got, plain_sums("llama"))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_target_above_the_stack_is_summed_in_the_forward_that_the_stack_takes(targets: list[str]) -> None:
    model = lorasb.patch(causal("Llama", tie_word_embeddings=False), r=3, target_modules=targets)
    forwards: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    got, report = library_sums(model, singles("llama"), strategy="layerwise")
    assert report.strategy == "layerwise"
    assert ("lm_head" in got) == ("lm_head" in targets)
    assert len(forwards) == len(singles("llama"))


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

    layerwise, accumulated = (
        library_sums("llama", singles("llama"), strategy=strategy, loss_fn=loss_fn)[0]
        for strategy in ("layerwise", "accumulate")
    )
    check_equal(layerwise, accumulated)


def test_the_named_list_of_blocks_is_taken() -> None:
    model, report = started(batches=singles("llama"), blocks="model.layers")
    assert "2 blocks at model.layers" in report.why
    with pytest.raises(NotAStackError, match=r"the model has no list of modules 'model\.towers'"):
        lorasb.initialize(model, singles("llama"), lr=1e-3, blocks="model.towers", strategy="layerwise", progress=False)


@pytest.mark.parametrize(
    ("family", "strategy"), [("llama", "layerwise"), ("llama", "accumulate"), ("roberta", "layerwise")]
)
def test_no_weight_requires_a_gradient_meanwhile_and_the_model_is_left_as_found(family: str, strategy: str) -> None:
    model, _ = started(family, batches=singles(family))
    model.gradient_checkpointing_enable()
    model.train().get_input_embeddings().eval()
    model.config.use_cache = model.config.output_hidden_states = True

    def state() -> list[object]:
        modules = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
        config = {name: value for name, value in vars(model.config).items() if isinstance(value, bool)}
        return [modules, config, [p.requires_grad for p in model.parameters()]]

    def watch(inner: nn.Module, _: object) -> None:
        watched.append(any(p.requires_grad for p in inner.parameters()) or any(m.training for m in inner.modules()))

    watched: list[bool] = []
    model.register_forward_pre_hook(watch)
    before, weights = state(), {n: p.clone() for n, p in model.named_parameters() if "lorasb" not in n}
    got, _ = library_sums(model, singles(family), strategy=strategy)
    assert watched
    assert not any(watched)
    check_sums(got, plain_sums(family))
    assert state() == before
    assert all(p.grad is None for p in model.parameters())
    check_equal({n: p for n, p in model.named_parameters() if n in weights}, weights)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers(model).values())


def test_boundaries_may_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []

    def keep(boundary: Tensor) -> Tensor:
        moved.append(boundary.double())
        return boundary.clone()

    monkeypatch.setattr(strategies, "_keep_on_device", keep)
    got, _ = library_sums("llama", singles("llama"), strategy="layerwise")
    assert len(moved) >= 6  # a boundary per block, and the tensors that blocks share
    check_sums(got, plain_sums("llama"))


@pytest.mark.parametrize(("initialized", "error"), [(False, KeyboardInterrupt), (True, RuntimeError)])
def test_cut_off_between_blocks(initialized: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lorasb.patch(make("llama"), r=4)
    if initialized:
        lorasb.initialize(model, singles("llama"), lr=1e-3, progress=False)
    before, flags = factors(model), [p.requires_grad for p in model.parameters()]
    plain = strategies.block_sums

    def failing(work: object, stack: object, i: int, traversals: object) -> object:
        if i == 0:  # the last block is written by then
            assert not all(torch.equal(value, before[key]) for key, value in factors(model).items())
            raise error("cut off")
        return plain(work, stack, i, traversals)

    monkeypatch.setattr(strategies, "block_sums", failing)
    with pytest.raises(error, match="cut off"):
        lorasb.initialize(model, singles("llama")[1:], lr=2e-3, progress=False)
    check_equal(factors(model), before)
    assert {layer.is_initialized("default") for layer in layers(model).values()} == {initialized}
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_no_more_than_one_blocks_sums_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries, too, are freed as blocks finish: memory does not grow with the number of layers."""
    model = lorasb.patch(llama(num_hidden_layers=6), r=3)
    alive: weakref.WeakSet[accumulator.LayerSum] = weakref.WeakSet()
    most, plain = [0], accumulator.LayerSum.__init__

    def counted(self: accumulator.LayerSum, *arguments: object) -> None:
        plain(self, *arguments)
        alive.add(self)
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(accumulator.LayerSum, "__init__", counted)
    boundaries: list[int] = []
    block_sums = strategies.block_sums

    def watched(work: object, stack: object, i: int, traversals: list[Traversal]) -> object:
        found = block_sums(work, stack, i, traversals)
        boundaries.append(sum(len(traversal.calls) for traversal in traversals))
        return found

    monkeypatch.setattr(strategies, "block_sums", watched)
    lorasb.initialize(model, singles("llama"), lr=1e-3, strategy="layerwise", progress=False)
    assert most[0] == 7
    assert boundaries == [15, 12, 9, 6, 3, 0]


class InPlace(nn.Module):
    """Two linears with an in-place operation between them."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.change = nn.Linear(8, 8), nn.Linear(8, 8), change

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(input_ids.double())
        return {"loss": (self.second(self.change(self.first(x), x)) - labels).square().mean()}


IN_PLACE = {
    "relu": lambda y, x: torch.relu_(y),
    "sum": lambda y, x: y.add_(x),
    "part": lambda y, x: (y[..., :4].mul_(2), y)[1],
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(1, 8), (1, 5, 8)])
def test_outputs_may_be_changed_in_place(change: str, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    batches = [{name: torch.randn(shape, generator=g).double() for name in ("input_ids", "labels")} for _ in range(3)]
    model = InPlace(IN_PLACE[change]).double()
    want = autograd_sums(copy.deepcopy(model), batches, loss_of)
    got, _ = library_sums(lorasb.patch(model, r=3, target_modules=["first", "second"]), batches, loss_fn=loss_of)
    check_sums(got, want, BATCHING)


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    model = lorasb.patch(InPlace(lambda y, x: x.add_(y)).double(), r=3, target_modules=["first", "second"])
    batch = {name: torch.ones(1, 5, 8).double() for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="the input of layer 'first' was changed in place after it ran: write x = x"):
        lorasb.initialize(model, [batch], lr=1e-3, loss_fn=loss_of, progress=False)


def test_blocks_that_draw_in_evaluation_draw_the_same_again() -> None:
    batches, state = singles("llama"), torch.get_rng_state()

    def drawing() -> nn.Module:
        model = lorasb.patch(make("llama"), r=3)
        for block in model.model.model.layers:
            block.mlp.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.5))
        torch.manual_seed(3)
        return model

    layerwise, accumulated = (library_sums(drawing(), batches, strategy=s)[0] for s in ("layerwise", "accumulate"))
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(3).get_state())
    check_sums(layerwise, accumulated, BATCHING)
    torch.set_rng_state(state)
