"""The paper's lemma and theorems, as identities between numbers."""

import pytest
import tolerances
import torch
from torch import Tensor, nn

import lorasb
from lorasb.init.factorize import first_step
from lorasb.init.svd import leading_triplets
from lorasb.layers.linear import LoRASBLinear

N, M, R = 12, 9, 4


def layer(scaling: float = 1.0, orthonormal: bool = True, equivalent: bool = False) -> LoRASBLinear:
    """A small fp64 layer with random factors."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(N, M, dtype=torch.float64)
    made = LoRASBLinear(base, "default", R, scaling=scaling, equivalent_gradient=equivalent)
    a, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((N, R), (M, R)))
    if orthonormal:
        a, b = torch.linalg.qr(a).Q, torch.linalg.qr(b).Q
    made.set_factors("default", b, torch.randn(R, R, generator=g, dtype=torch.float64) * 0.1, a.t())
    return made


def loss_of(made: LoRASBLinear, weight: Tensor | None = None) -> Tensor:
    """A fixed smooth loss, through the layer or through a full weight in its place."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(20, N, generator=g, dtype=torch.float64)
    target = torch.randn(20, M, generator=g, dtype=torch.float64)
    y = made(x) if weight is None else nn.functional.linear(x, weight, made.bias)
    return (torch.tanh(y) - target).square().mean()


def full_gradient(made: LoRASBLinear) -> Tensor:
    """∇W L at W0 + s·B R A."""
    weight = (made.base.parameter() + made.get_delta_weight("default")).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(made, weight), weight)
    return gradient


def core_gradient(made: LoRASBLinear) -> Tensor:
    made.zero_grad()
    loss_of(made).backward()
    gradient = made.lorasb_R["default"].grad
    assert gradient is not None
    return gradient


def moved(made: LoRASBLinear, core: Tensor) -> Tensor:
    """g̃ = s B g_R A (Definition 1)."""
    return made.scaling["default"] * made.lorasb_B["default"] @ core @ made.lorasb_A["default"]


@pytest.mark.parametrize("scaling", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("orthonormal", [True, False])
def test_lemma_2(scaling: float, orthonormal: bool) -> None:
    made = layer(scaling, orthonormal)
    want = scaling * made.lorasb_B["default"].t() @ full_gradient(made) @ made.lorasb_A["default"].t()
    tolerances.check(core_gradient(made), want, tolerances.THEORY)


@pytest.mark.parametrize("scaling", [0.1, 1.0, 10.0])
def test_theorem_3_minimizes_the_distance_to_the_full_gradient(scaling: float) -> None:
    made = layer(scaling, orthonormal=False)
    g = full_gradient(made)
    core_gradient(made)
    best = lorasb.equivalent_gradient(made)
    distance = (moved(made, best) - g).norm()
    # the least-squares solution by another route: vec(s B X A) = s (Aᵀ ⊗ B) vec(X)
    a, b = made.lorasb_A["default"], made.lorasb_B["default"]
    design = scaling * torch.kron(b.contiguous(), a.t().contiguous())
    solution = torch.linalg.lstsq(design, g.reshape(-1, 1)).solution.reshape(R, R)
    tolerances.check(best, solution, tolerances.THEORY)
    for seed in range(20):
        other = best + 0.1 * torch.randn(R, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (moved(made, other) - g).norm() >= distance


def test_the_layer_option_gives_theorem_3s_gradient() -> None:
    plain, option = layer(3.0, orthonormal=False), layer(3.0, orthonormal=False, equivalent=True)
    option.base_layer.load_state_dict(plain.base_layer.state_dict())
    core_gradient(plain)
    want = lorasb.equivalent_gradient(plain)
    tolerances.check(core_gradient(option), want, tolerances.THEORY)
    tolerances.check(lorasb.equivalent_gradient(option), want, tolerances.THEORY)


def test_orthonormal_factors_need_no_correction() -> None:
    made = layer(1.0)
    with pytest.raises(ValueError, match=r"has no gradient: call loss.backward\(\) first"):
        lorasb.equivalent_gradient(made)
    tolerances.check(core_gradient(made), lorasb.equivalent_gradient(made), tolerances.THEORY)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_theorem_4_a_small_step_lowers_the_loss_as_predicted(orthonormal: bool) -> None:
    made = layer(2.0, orthonormal)
    plain = core_gradient(made).clone()
    step = lorasb.equivalent_gradient(made).clone()
    predicted = float((plain * step).sum())
    assert predicted > 0
    before, eta = float(loss_of(made).detach()), 1e-6
    with torch.no_grad():
        made.lorasb_R["default"].sub_(eta * step)
    change = (float(loss_of(made).detach()) - before) / eta
    assert change == pytest.approx(-predicted, rel=1e-3)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_theorem_5_the_equivalent_gradient_does_not_depend_on_s(orthonormal: bool) -> None:
    found, plain = [], []
    base = nn.Linear(N, M, dtype=torch.float64).state_dict()
    for s in (0.1, 1.0, 10.0):
        made = layer(s, orthonormal)
        made.base_layer.load_state_dict(base)
        with torch.no_grad():
            made.lorasb_R["default"].div_(s)  # the same W0 + s·B R A
        core = core_gradient(made)
        plain.append(moved(made, core))
        found.append(moved(made, lorasb.equivalent_gradient(made)))
    for other in found[1:]:
        tolerances.check(other, found[0], tolerances.THEORY)
    assert (plain[2] - plain[0]).norm() > 10 * plain[0].norm()  # with R's own gradient it does depend on s, as s²


def test_theorem_6_the_first_sgd_update_is_the_best_of_its_rank() -> None:
    made = layer()
    weight = made.base.parameter().detach().clone().requires_grad_(True)
    (g,) = torch.autograd.grad(loss_of(made, weight), weight)
    eta = 0.01
    triplets = leading_triplets(g, R, seed=0)
    factors = first_step(triplets, R, eta, 1.0)
    made.set_factors("default", factors.b, torch.zeros_like(factors.core), factors.a)
    step = moved(made, -eta * core_gradient(made))  # Δ(B R A) of one SGD step from R = 0
    u, s, vt = torch.linalg.svd(-eta * g)
    best = u[:, :R] @ torch.diag(s[:R]) @ vt[:R]
    tolerances.check(step, best, tolerances.THEORY)
    for scaling in (0.5, 1.0, 4.0):  # and R starts at this update
        start = first_step(triplets, R, eta, scaling)
        tolerances.check(scaling * start.b @ start.core @ start.a, best, tolerances.THEORY)
