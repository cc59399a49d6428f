"""Which models are stacks of blocks, how others are detected, and layers that no sample reaches."""

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable

import pytest
import tolerances
import torch
from adapters import unchanged
from gradients import autograd_sums, check_sums, library_sums
from models import causal, make, text
from networks import Mixture, loss_of
from torch import Tensor, nn

import lorasb
from lorasb.init.block_recorder import NotAStackError, find_stack


def test_an_encoder_decoder_is_a_stack_and_a_pass() -> None:
    """T5's blocks share a bias that depends on no target; the encoder's layers take a pass over the entire model."""
    batches = [text(1, 8, seed) for seed in range(2)]
    want = autograd_sums("t5", batches)
    for strategy in ("auto", "accumulate"):
        got, report = library_sums("t5", batches, strategy=strategy)
        assert report.strategy == ("layerwise" if strategy == "auto" else "accumulate")
        assert {name.partition(".")[0] for name in got} == {"encoder", "decoder"}
        check_sums(got, want, tolerances.BATCHING)  # gradients at the encoder's output are summed in another order


def test_a_position_bias_that_later_blocks_get_is_no_stack() -> None:
    batches, targets = [text(1, 8, seed) for seed in range(2)], ["q", "wo", "relative_attention_bias"]
    want = autograd_sums("t5", batches)
    want |= {name: g.t() for name, g in want.items() if "bias" in name}  # an embedding's W has a column per id
    got, report = library_sums(lorasb.patch(make("t5"), r=2, target_modules=targets), batches)
    assert report.strategy == "accumulate"
    check_sums(got, want, tolerances.BATCHING)


def test_the_router_of_a_mixture_has_a_loss_of_its_own() -> None:
    """transformers captures router logits by hooks: gradients reach hidden states that no block returns."""
    batches = [text(1, 8, seed) for seed in range(2)]
    for aux in (True, False):
        options = {"output_router_logits": aux, "router_aux_loss_coef": 0.5}
        plain = causal("Mixtral", num_local_experts=4, **options).eval()
        model = lorasb.patch(copy.deepcopy(plain), r=3, target_modules=["q_proj", "o_proj"])
        got, report = library_sums(model, batches)
        assert report.strategy == ("accumulate" if aux else "layerwise")
        check_sums(got, autograd_sums(plain, batches))


def sums_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Plain autograd's sums over batches of two rows, whose loss is a mean."""
    for batch in copy.deepcopy(batches):
        (model(**batch)["loss"] * 2).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}


class Chain(nn.Module):
    """A sequence of blocks; `kind` selects how the model deviates from a plain stack, if it does."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.head = nn.Linear(40, 40), nn.Linear(40, 40)
        self.layers = nn.ModuleList(Block(kind) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        between, aux, start, step = [], 0.0, self.stem(x), torch.ones(40)
        x, shared = start, SHARED.get(self.kind, lambda: None)()
        for i in ORDERS.get(self.kind, [0, 1, 2]):
            if self.kind == "early" and i == 2 and labels[0] > 0:
                break
            if self.kind == "first" and between:
                shared = between[0]
            if self.kind == "argument in place":
                shared = step if shared is None else shared.add_(0.5)
            x = self.layers[i](x, shared) if self.kind in SHARING else self.layers[i](x)
            between.append(x)
            if self.kind == "mixed":
                x = x * 1.5
            if self.kind == "side":
                aux = aux + x.square().mean()
        if self.kind in ("deep", "deeper"):
            x = x + between[self.kind == "deeper"]
        if self.kind == "skip":
            x = x + start
        if self.kind == "used outside":
            x = torch.sin(self.layers[0].proj(x))
        return {"loss": (self.head(x).square().mean(-1) - labels).square().mean() + aux}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(40, 40)

    def forward(self, x: Tensor, shared: object = None) -> Tensor:
        if self.kind == "in place":
            x *= 1.5
        if isinstance(shared, Tensor):
            x = x + 0.1 * shared * torch.tanh(self.proj(x))
        return x + torch.tanh(self.proj(x))


ORDERS = {"twice": [0, 1, 1, 2], "loop": [0, 1, 2, 0, 1, 2]}
STACKS = ("plain", "skip")
TWICE = ("twice", "loop", "used outside", "first", "argument in place")
SHARED: dict[str, Callable[[], object]] = {"shared": dict, "shared by a class": UserDict}
SHARING = (*SHARED, "first", "argument in place")
NO_STACKS = {
    "twice": "block 1 runs after block 1, or more than once",
    "loop": "block 0 runs more than once in a forward, on its own results",
    "early": "a forward leaves the stack before its last block",
    "mixed": "the input of block 1 is not the output of the block before",
    "deep": "the loss depends on the hidden states between blocks too",
    "deeper": "the loss depends on the hidden states between blocks too",
    "side": "the loss depends on the hidden states between blocks too",
    "first": "block 1 takes more from the blocks before than their hidden states",
    "shared": "blocks share a dict that they may write to",
    "shared by a class": "blocks share a UserDict that they may write to",  # as with Gemma 3n's keys and values
    "in place": "something that passes between blocks is changed in place",
    "argument in place": "something that passes between blocks is changed in place",
    "used outside": "layer 'layers.0.proj' also runs outside of its block",
}


@pytest.mark.parametrize("kind", [*STACKS, *NO_STACKS])
def test_what_is_no_plain_stack_is_noticed(kind: str) -> None:
    """Layers above and below the stack are summed along with it or in a separate pass."""
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2).abs() * sign} for sign in (1.0, -1.0)]
    model = lorasb.patch(Chain(kind), r=3, target_modules=["proj", "stem", "head"])
    got, report = library_sums(model, batches, loss_fn=loss_of)
    # autograd adds the gradients of a weight's two uses before adding them to the sum
    check_sums(got, sums_of(Chain(kind), batches), tolerances.BATCHING if kind in TWICE else tolerances.EXACT)
    assert list(got) == ["stem", "head", *(f"layers.{i}.proj" for i in range(3))]
    assert report.strategy == ("layerwise" if kind in STACKS else "accumulate")
    assert NO_STACKS.get(kind, "3 blocks at layers") in report.why
    losses = [loss_of(Chain(kind), batch).item() for batch in batches]
    assert report.loss == pytest.approx(sum(losses) / len(losses))  # counted once, even after a fallback


def test_a_list_of_towers_that_take_ids() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.towers = nn.ModuleList(
                nn.Sequential(OrderedDict(embed=nn.Embedding(9, 40), proj=nn.Linear(40, 40))) for _ in range(2)
            )

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            left, right = (tower(x).tanh().mean(1) for tower in self.towers)
            return {"loss": ((left * right).sum(-1) - labels).square().mean()}

    batches = [{"x": torch.arange(8).view(2, 4), "labels": torch.randn(2)}]
    got, report = library_sums(lorasb.patch(Towers(), r=3, target_modules=["proj"]), batches, loss_fn=loss_of)
    assert "the first input of block 0 is no tensor of hidden states" in report.why
    check_sums(got, sums_of(Towers(), batches))


def test_a_layer_that_several_blocks_share() -> None:
    model = Chain()
    model.layers[1].proj = model.layers[0].proj
    with pytest.raises(NotAStackError, match=r"layer 'layers\.0\.proj' belongs to several blocks"):
        find_stack(model, {name: m for name, m in model.named_modules() if name.endswith("proj")})


def test_the_stack_is_the_list_with_the_most_weights() -> None:
    lists = {"many": [4] * 5, "wide": [16] * 2}  # five small blocks, or two with three times their weights
    model = nn.ModuleDict({n: nn.ModuleList(nn.Sequential(nn.Linear(k, k)) for k in ks) for n, ks in lists.items()})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert find_stack(model, linears).name == "wide"
    assert find_stack(model, linears, "many").names == {f"many.{i}.0" for i in range(5)}
    with pytest.raises(NotAStackError, match="the model has no list of modules 'none'"):
        find_stack(model, linears, "none")
    with pytest.raises(NotAStackError, match="no list of modules holds a target layer"):
        find_stack(model, {"other": nn.Linear(2, 2)})


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_experts_that_were_not_routed_to_are_named_and_start_from_their_weight(strategy: str) -> None:
    model = lorasb.patch(Mixture(), r=3, target_modules=r"layers\.\d+\.experts\.\d+")
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2)}]
    with pytest.warns(UserWarning, match=r"4 layers were not reached .* R = 0: layers\.0\.experts\.2, layers"):
        report = lorasb.initialize(model, batches, lr=1e-3, strategy=strategy, progress=False, loss_fn=loss_of)
    idle = [f"layers.{i}.experts.{j}" for i in range(2) for j in (2, 3)]
    assert [layer.name for layer in report.layers if layer.fallback] == idle
    idle = model.get_submodule("base_model.model.layers.1.experts.3")
    u, _, vt = torch.linalg.svd(idle.base.parameter())
    assert not idle.lorasb_R["default"].any()
    for share in (idle.lorasb_B["default"].t() @ u[:, :3], idle.lorasb_A["default"] @ vt[:3].t()):
        assert (share.abs() - torch.eye(3)).abs().max() < 1e-4
    assert idle.is_initialized("default")
    model.train()
    loss_of(model, batches[0]).backward()


@pytest.mark.parametrize("strategy", ["layerwise", "accumulate"])
def test_a_layer_whose_output_nobody_uses(strategy: str) -> None:
    model = Mixture()
    for layer in model.layers:
        layer.idle = nn.Linear(40, 40)
        layer.register_forward_pre_hook(lambda module, args: (module.idle(args[0]), None)[1])
    model = lorasb.patch(model, r=3, target_modules=r"layers\.\d+\.(idle|experts\.0)")
    batches = [{"x": torch.randn(2, 40), "labels": torch.randn(2)}]
    message = r"layer 'layers\.0\.idle' ran, but the loss does not depend on it"
    with unchanged(model), pytest.raises(ValueError, match=message):
        lorasb.initialize(model, batches, lr=1e-3, strategy=strategy, progress=False, loss_fn=loss_of)
