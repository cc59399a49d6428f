"""Derivatives beyond one backward: under a transform, torch's own ops compute them; others are right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import reference
import tolerances
import torch
from calls import INDEX, SOME, dense, make_call, outputs
from torch import Tensor
from torch.autograd import forward_ad

import lorasb
from lorasb.functional import lora_sb_linear

Layer = Callable[[Tensor, Tensor], Tensor]  # (x [M, n], R [r, r]) -> y [M, n]
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"square": lambda y: y.square().sum(), "sum": lambda y: y.sum()}
REFUSED = "no second derivative"


def layers_of(kind: str, dtype: torch.dtype = torch.float64, n: int = 32) -> tuple[reference.Case, Layer, Layer]:
    """A call's first case, the call with one R for all members, and the same call in plain torch."""
    cases, options = make_call(kind, dtype, (), n, n, 4)
    return cases[0], *functions_of(cases, bool(options))


def functions_of(cases: list[reference.Case], rows: bool = False) -> tuple[Layer, Layer]:
    twins = [dense(case) for case in cases]

    def layer(x: Tensor, core: Tensor) -> Tensor:
        ys = outputs(cases, x, [core] * len(cases), **({"index": INDEX[: len(x)]} if rows else {}))
        return sum((1 + j) * y[..., : x.shape[-1]] for j, y in enumerate(ys))  # type: ignore[return-value]

    def expected(x: Tensor, core: Tensor) -> Tensor:
        chosen = torch.stack([core[k] * (k >= 0) for k in INDEX[: len(x)]]) if rows else core
        ys = []
        for case in twins:
            v = (x @ case.a.t())[:, None] @ chosen.mT if rows else (x @ case.a.t() @ chosen.mT)[:, None]
            y = x @ case.weight.t() + case.scaling * v[:, 0] @ case.b.t()
            ys.append(y if case.bias is None else y + case.bias)
        return sum((1 + j) * y[..., : x.shape[-1]] for j, y in enumerate(ys))  # type: ignore[return-value]

    return layer, expected


def second(function: Layer, case: reference.Case, loss: Callable[[Tensor], Tensor], wrt: int) -> Tensor:
    """A second derivative of a residual block."""
    inputs = [t.clone().requires_grad_(True) for t in (case.x, case.core)]
    y = loss((inputs[0] + function(*inputs)).sin())
    first = torch.autograd.grad(y, inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs[wrt])[0]


@pytest.mark.parametrize("wrt", [0, 1], ids=["x", "R"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["auto", pytest.param("eager", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", SOME)
def test_a_second_derivative_in_a_residual_block_is_right_or_refused(
    kind: str, backend: str, composed: bool, loss: str, wrt: int
) -> None:
    case, layer, expected = layers_of(kind)
    given = case, LOSSES[loss], wrt
    with lorasb.backend(backend):
        if composed and not any(word in kind for word in ("rows", "nf4", "int8")):
            tolerances.check(second(layer, *given), second(expected, *given), tolerances.FP64)
        else:
            with pytest.raises(RuntimeError, match=REFUSED):
                second(layer, *given)


@pytest.mark.parametrize(
    ("M", "autocast", "dtype"),
    [(64, False, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [(6144, False, torch.float32), (64, True, torch.float32), (6144, True, torch.float32)],
)
def test_a_second_derivative_is_right_or_refused_at_real_sizes(M: int, autocast: bool, dtype: torch.dtype) -> None:
    case = reference.make_case((M,), 256, 256, 8, dtype, bias=False)
    layer, _ = functions_of([case])
    x, core = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        (g,) = torch.autograd.grad((x + layer(x, core)).float().sin().sum(), x, create_graph=True)
    try:
        found = torch.autograd.grad(g.float().square().sum(), [x, core])
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return
    wide = case.double()
    x, core = wide.x.clone().requires_grad_(True), wide.core.clone().requires_grad_(True)
    _, expected = functions_of([wide])
    (g,) = torch.autograd.grad((x + expected(x, core)).sin().sum(), x, create_graph=True)
    for one, right in zip(found, torch.autograd.grad(g.square().sum(), [x, core]), strict=True):
        assert torch.nn.functional.cosine_similarity(one.double().flatten(), right.flatten(), 0) > 0.99


def test_the_path_from_x_to_the_gradient_of_r_is_not_pruned(composed: bool) -> None:
    """If the loss is a sum, dR = s·tᵀ u is linear in x and depends on x only through u."""
    case, layer, expected = layers_of("dense")
    results = []
    for function in (layer, expected):
        x, core = (t.clone().requires_grad_(True) for t in (case.x, case.core))
        (dcore,) = torch.autograd.grad(function(x, core).sum(), core, create_graph=True)
        loss = dcore.square().sum() + x.sum()  # so that autograd.grad does not report x as unused
        if function is layer and not composed:
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(loss, x)
            return
        results.append(torch.autograd.grad(loss, x)[0])
    tolerances.check(*results, tolerances.FP64)


def test_create_graph_alone_is_no_error(composed: bool) -> None:
    case, layer, expected = layers_of("dense")
    found = []
    for function in (layer, expected):
        core = case.core.clone().requires_grad_(True)
        found.append(torch.autograd.grad(function(case.x, core).square().sum(), core, create_graph=True)[0].detach())
    tolerances.check(*found, tolerances.FP64)


TRANSFORMS: dict[str, Callable[[Layer, reference.Case], Any]] = {
    "jvp": lambda f, c: torch.func.jvp(f, (c.x, c.core), (c.dy, c.core.sin()))[1],
    "jacfwd": lambda f, c: torch.func.jacfwd(f, argnums=1)(c.x, c.core),
    "jacrev": lambda f, c: torch.func.jacrev(f, argnums=1)(c.x, c.core),
    "grad": lambda f, c: torch.func.grad(lambda x, R: f(x, R).sin().sum(), argnums=0)(c.x, c.core),
    "hessian": lambda f, c: torch.func.hessian(lambda R: f(c.x, R).sin().sum())(c.core),
    "vmap over R": lambda f, c: torch.vmap(f, (None, 0))(c.x, torch.stack([c.core, 2 * c.core])),
    "gradients by sample": lambda f, c: torch.vmap(torch.func.grad(lambda R, x: f(x[None], R).sin().sum()), (None, 0))(
        c.core, c.x
    ),
}


@pytest.mark.parametrize("grad_mode", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", SOME)
def test_transforms_agree_with_plain_torch(kind: str, transform: str, grad_mode: bool) -> None:
    case, layer, expected = layers_of(kind)
    with torch.set_grad_enabled(grad_mode):
        tolerances.check(TRANSFORMS[transform](layer, case), TRANSFORMS[transform](expected, case), tolerances.FP64)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", SOME)
def test_forward_mode_without_a_transform(kind: str, grad_mode: bool) -> None:
    case, layer, expected = layers_of(kind)
    tangents = []
    for function in (layer, expected):
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            x = forward_ad.make_dual(case.x, case.dy)
            tangents.append(forward_ad.unpack_dual(function(x, case.core)).tangent)
    tolerances.check(*tangents, tolerances.FP64)


@pytest.mark.parametrize(("rows", "adapters"), [(3, 0), (0, 1)])
def test_rows_without_any_adapter_and_an_empty_batch_have_a_derivative(rows: int, adapters: int) -> None:
    case = reference.make_case((rows,), 8, 6, 2, torch.float64)
    rest = case.a, case.core.new_zeros(adapters, 2, 2), case.b

    def layer(x: Tensor) -> Tensor:
        return lora_sb_linear(x, case.weight, *rest, index=[-1] * rows)

    found = torch.func.jvp(layer, (case.x,), (case.x.sin(),))[1]
    tolerances.check(found, case.x.sin() @ case.weight.t(), tolerances.FP64)


def test_a_damaged_adapter_reaches_no_other_rows() -> None:
    (case,), _ = make_call("rows", torch.float64, ())
    case.core[0] = float("nan")
    damaged = torch.tensor([k == 0 for k in INDEX])
    for transform in ("jvp", "vmap"):

        def layer(x: Tensor) -> Tensor:
            return lora_sb_linear(x, case.weight, case.a, case.core, case.b, case.bias, index=INDEX)

        y = torch.func.jvp(layer, (case.x,), (case.x,))[0] if transform == "jvp" else torch.vmap(layer)(case.x[None])[0]
        assert torch.equal(y.isnan().any(1), damaged)


@pytest.mark.parametrize("transform", ["jvp", "grad", "gradients by sample"])
def test_transforms_in_a_compiled_function(transform: str) -> None:
    case, layer, _ = layers_of("dense")
    compiled = torch.compile(lambda: TRANSFORMS[transform](layer, case), backend="aot_eager", fullgraph=True)
    tolerances.check(compiled(), TRANSFORMS[transform](layer, case), tolerances.FP64)


def test_frozen_tensors_have_no_gradient_under_a_transform_either() -> None:
    case, _, _ = layers_of("dense")

    def loss(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_sb_linear(case.x, weight, a, case.core, b).square().sum()

    for gradient in torch.func.grad(loss, argnums=(0, 1, 2))(case.weight, case.a, case.b):
        assert not gradient.any()


def test_dropout_under_vmap_follows_its_randomness() -> None:
    case, _, _ = layers_of("dense")

    def call(core: Tensor) -> Tensor:
        return lora_sb_linear(case.x, case.weight, case.a, core, case.b, dropout=0.5)

    cores = torch.stack([case.core, case.core])
    same, different = (torch.vmap(call, randomness=kind)(cores) for kind in ("same", "different"))
    tolerances.check(same[0], same[1], tolerances.FP64)  # torch may order the sums of equal matrices differently
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(cores)


def test_gradients_by_sample_of_a_patched_model() -> None:
    """Per-sample gradients of all R's take r² numbers per sample and layer."""
    model = models.patched(init="lora-xs")
    model.get_base_model().set_attn_implementation("eager")  # the fused one has no vmap rule, so vmap warns
    ids = models.text(3, 7, 0)["input_ids"]
    cores = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(cores: dict[str, Tensor], row: Tensor) -> Tensor:
        batch = {"input_ids": row[None], "labels": row[None]}
        found: Tensor = torch.func.functional_call(model, cores, (), batch).loss
        return found

    by_sample = torch.vmap(torch.func.grad(loss), (None, 0))(cores, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for name, parameter in cores.items():
            assert parameter.grad is not None
            tolerances.check(by_sample[name][i], parameter.grad, tolerances.BATCHING)


CAPTURES: dict[str, Callable[[torch.nn.Module, Tensor], Any]] = {
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "trace": lambda layer, x: torch.jit.trace(layer, (x,)),  # its own check runs with gradients
}


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:`torch.jit")
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", ["no bias", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_captured_without_gradients_has_them_when_it_runs_with_them(
    dtype: torch.dtype, kind: str, capture: str
) -> None:
    case = make_call(kind, dtype, (), 64, 32, 4)[0][0]

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = torch.nn.Parameter(case.core.clone())

        def forward(self, x: Tensor) -> Tensor:
            return lora_sb_linear(x, case.weight, case.a, self.core, case.b, case.bias, case.scaling)

    layer = Layer()
    with torch.no_grad():
        captured = CAPTURES[capture](layer, case.x)
    x = case.x.clone().requires_grad_(True)
    captured(x).backward(case.dy)
    wide_dx, wide_dcore = reference.gradients(dense(case).double())
    for found, want in ((x.grad, wide_dx), (captured.core.grad, wide_dcore)):
        assert found is not None
        if dtype == torch.float32:
            tolerances.check(found, want, tolerances.fp32(100))
        else:
            assert torch.nn.functional.cosine_similarity(found.double().flatten(), want.flatten(), 0) > 0.999
