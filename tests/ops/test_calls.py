"""Call signatures are equal where checks and kernels are the same; plain CPU calls skip the dispatcher, and their
results equal the op's bit for bit.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import reference
import tolerances
import torch
import torch._dynamo.testing
from calls import INDEX, KINDS, make_call, outputs, run
from hypothesis import given
from hypothesis import strategies as st
from tolerances import check_equal
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorasb import functional
from lorasb.backends import cpp, eager
from lorasb.functional import lora_sb_linear, lora_sb_linear_group
from lorasb.kernels import prepared_launch
from lorasb.ops import calls, registry

needs_extension = pytest.mark.skipif(cpp.extension is None, reason="this build has no C++ extension")
Signature = Callable[..., Any]


@pytest.fixture(params=["python", pytest.param("extension", marks=needs_extension)])
def ways(request: pytest.FixtureRequest) -> tuple[Signature, Signature]:
    """The functions `signature` and `metadata`, in Python or from the extension."""
    if request.param == "python":
        return calls.signature_in_python, calls.metadata_in_python
    return cpp.extension.signature, cpp.extension.metadata


def tensors() -> st.SearchStrategy[Tensor]:
    """Tensors of few kinds, so that two often match."""

    def build(dtype: torch.dtype, shape: tuple[int, ...], turned: bool, parameter: bool, start: int) -> Tensor:
        storage = torch.zeros(64, dtype=dtype)[start:]
        found = storage[: torch.Size(shape).numel()].view(shape)
        found = found.t() if turned and len(shape) == 2 else found
        return torch.nn.Parameter(found, requires_grad=False) if parameter else found

    shapes = st.sampled_from([(), (2,), (1, 2), (2, 1), (2, 3), (3, 2), (2, 3, 2)])
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    return st.builds(build, dtypes, shapes, st.booleans(), st.booleans(), st.integers(0, 2))


OPERANDS = st.lists(st.one_of(st.none(), tensors(), st.lists(st.one_of(st.none(), tensors()), max_size=2)), max_size=3)


@needs_extension
@given(OPERANDS, OPERANDS)
def test_the_extension_tells_apart_what_python_tells_apart(one: list[Any], other: list[Any]) -> None:
    alike = calls.metadata_in_python(*one) == calls.metadata_in_python(*other)
    assert (cpp.extension.metadata(*one) == cpp.extension.metadata(*other)) == alike
    assert cpp.extension.metadata(*one) == cpp.extension.metadata(*one)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_is_no_plain_tensor_has_no_signature(ways: tuple[Signature, Signature]) -> None:
    class Other(Tensor):
        pass

    plain, endless = torch.ones(2, 2), []  # type: ignore[var-annotated]
    endless.append(endless)
    with FakeTensorMode():
        fake = torch.ones(2, 2)
    nested = torch.nested.nested_tensor([plain, plain], layout=torch.strided)
    negated = torch.complex(plain, plain).conj().imag
    for way in ways:
        for other in (plain.to_sparse(), negated, 3, [plain, [plain]], endless, fake, nested, plain.as_subclass(Other)):
            assert way(plain, other) is None, type(other)
        assert way(plain, [plain], None) is not None


def test_an_x_that_meets_more_than_kernels_has_none(ways: tuple[Signature, Signature]) -> None:
    plain, (of, _), leaked = torch.ones(2, 2), ways, []
    torch.func.vmap(lambda y: leaked.append(y) or y)(plain)  # a wrapper that outlives its transform
    for x in (leaked[0], torch._efficientzerotensor(2, 2), torch._to_functional_tensor(plain)):
        assert of(x, plain) is None


def test_nothing_is_known_where_ops_are_intercepted(ways: tuple[Signature, Signature]) -> None:
    of, metadata = ways
    x, seen = torch.ones(2, 2), []

    def look(y: Tensor) -> Tensor:
        seen.append(of(x))
        return y.sum()

    with FlopCounterMode(display=False):
        look(x)
    with torch.device("cpu"):  # a __torch_function__ mode
        look(x)
    torch.func.grad(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    assert seen == [None] * 4
    assert of(x) == of(x + 1) == metadata(x)


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> reference.Case:
    """A call that uses our own backward; no signature has passed the checks yet."""
    monkeypatch.setattr(calls, "known", set())
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    return reference.make_case((5,), 24, 20, 4, torch.float32)


def test_a_call_is_checked_once_a_signature(case: reference.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    check = calls.check_linear
    monkeypatch.setattr(calls, "check_linear", lambda *given: (checked.append(given), check(*given)))
    for _ in range(3):
        lora_sb_linear(case.x.clone(), case.weight, case.a, case.core.clone(), case.b)
    assert len(checked) == 1
    lora_sb_linear(case.x[:4], case.weight, case.a, case.core, case.b)
    assert len(checked) == 2


def test_a_bad_call_is_refused_after_good_ones_and_again(case: reference.Case) -> None:
    lists = [[tensor] * 2 for tensor in (case.weight, case.a, case.core, case.b)]
    for _ in range(2):
        lora_sb_linear(case.x, case.weight, case.a, case.core, case.b)
        lora_sb_linear_group(case.x, *lists, scalings=[1.0, 2.0])
        with pytest.raises(ValueError, match="one of each argument"):
            lora_sb_linear_group(case.x, *lists, scalings=[1.0])
        with pytest.raises(TypeError, match="in x's dtype"):
            lora_sb_linear(case.x, case.weight.half(), case.a, case.core, case.b)
        with pytest.raises(ValueError, match="expected x"):
            lora_sb_linear(case.x[:, :20], case.weight, case.a, case.core, case.b)
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
            lora_sb_linear(case.x.detach().requires_grad_(), case.weight, case.a, case.core, case.b)


def test_compiled_calls_do_not_depend_on_what_is_known(case: reference.Case) -> None:
    def call(x: Tensor) -> Tensor:
        one = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
        lists = [[tensor] * 2 for tensor in (case.weight, case.a, case.core, case.b)]
        return one + sum(lora_sb_linear_group(x, *lists))

    call(case.x)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for rows in range(1, 4):
        compiled(case.x)
        call(case.x[:rows])  # an eager call of a new signature
    assert counter.frame_count == 1


def test_signatures_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_SIGNATURES", 2)
    monkeypatch.setattr(calls, "known", set())
    for i in range(5):
        calls.remember(i)
        assert i in calls.known
    assert len(calls.known) <= 2


@needs_extension
def test_tensors_by_one_call() -> None:
    like = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    found = cpp.extension.allocate(like, [(2, 3), (0, 4), torch.Size((5,)), ()])
    assert [tuple(tensor.shape) for tensor in found] == [(2, 3), (0, 4), (5,), ()]
    assert all(t.dtype == like.dtype and t.device == like.device and not t.requires_grad for t in found)
    assert cpp.extension.allocate(like.to("meta"), [(2, 3)])[0].is_meta
    assert cpp.extension.allocate(like, ()) == []
    for bad, error in ((([2],), TypeError), ((("a",),), TypeError), (((-1,),), RuntimeError), (3, TypeError)):
        with pytest.raises(error):
            cpp.extension.allocate(like, bad)


@needs_extension
def test_addresses_of_aligned_tensors() -> None:
    tensors = [torch.ones(16), torch.ones(3, dtype=torch.bfloat16), torch.empty(0)]
    for addresses in (cpp.extension.addresses, prepared_launch.addresses_in_python):
        assert addresses([]) == []
        assert addresses(tensors) == [tensor.data_ptr() for tensor in tensors]
        assert addresses([*tensors, tensors[0][1:]]) is None
    for bad in (tuple(tensors), [1], None):
        with pytest.raises(TypeError, match="a list of tensors"):
            cpp.extension.addresses(bad)


@needs_extension
def test_memory_that_nobody_wrote_is_nan_in_every_test() -> None:
    """However the kernels' callers allocate memory, reading it before it is written gives NaN."""
    like = torch.ones(3, dtype=torch.bfloat16)
    made = [torch.empty(3), torch.empty_like(like), like.new_empty(3), *cpp.extension.allocate(like, [(3,)])]
    assert all(tensor.isnan().all() for tensor in made)


@pytest.mark.parametrize("first", ["CPU", "CompositeExplicitAutograd"])
def test_direct_kernels_of_a_device_win_in_any_order_of_registration(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "direct_kernels", {})
    kernels = {key: (Mock(), Mock()) for key in ("CPU", "CompositeExplicitAutograd")}
    for key in sorted(kernels, key=lambda key: key != first):
        registry.record("eager", [key], *kernels[key])
    found = {device: registry.direct_kernels["eager", device].forward for device in ("cpu", "cuda")}
    assert found == {"cpu": kernels["CPU"][0], "cuda": kernels["CompositeExplicitAutograd"][0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "dropout"])
def test_the_fast_path_equals_the_op_to_the_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    cases, options = make_call(kind, dtype)
    results = []
    for _ in range(2):
        results.append(run(*cases, **options, seed=1))
        monkeypatch.setattr(functional, "direct_kernels", {})
    check_equal(*results)


@pytest.mark.parametrize("constant", [False, True])
def test_a_second_derivative_is_refused_as_by_the_op(
    case: reference.Case, constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of y.sum(): its gradient is constant, yet dx depends on R, so the result would be wrong without an error."""
    for _ in range(2):
        x, core = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(constant)
        y = lora_sb_linear(x, case.weight, case.a, core, case.b)
        loss = (y if constant else y.square()).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()
        monkeypatch.setattr(functional, "direct_kernels", {})


@pytest.mark.parametrize("index", [INDEX, [0, 0, 1, 1, -1, 2, 2]], ids=["unequal counts", "equal counts"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind: str, index: list[int]) -> None:
    cases, options = make_call(kind, torch.float32)
    options = {"index": index} if options else {}
    x, cores = cases[0].x.clone().requires_grad_(True), [case.core.clone().requires_grad_(True) for case in cases]
    y = torch.cat(outputs(cases, x, cores, **options), -1)
    dys = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(0))
    batched = torch.autograd.grad(y, (x, *cores), dys, is_grads_batched=True, retain_graph=True)
    for k, dy in enumerate(dys):
        single = torch.autograd.grad(y, (x, *cores), dy, retain_graph=True)
        for one, expected in zip(batched, single, strict=True):
            tolerances.check(one[k], expected, tolerances.fp32(y.shape[-1]))


def test_a_gradient_that_is_not_there_leaves_none(case: reference.Case) -> None:
    class Absorb(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> None:
            return None

    core = case.core.clone().requires_grad_(True)
    Absorb.apply(lora_sb_linear(case.x, case.weight, case.a, core, case.b)).sum().backward()
    assert core.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_frozen_tensors_get_no_gradients(kind: str, composed: bool, backend: str) -> None:
    cases, options = make_call(kind, torch.float32)
    frozen = [t for c in cases for t in (c.weight, c.a, c.b, c.bias) if isinstance(t, Tensor)]
    for tensor in frozen:
        tensor.requires_grad_(True)
    run(*cases, backend=backend, **options)
    assert [tensor.grad for tensor in frozen] == [None] * len(frozen)


def test_a_checkpoint_recomputes_what_a_mode_saw_forward(case: reference.Case) -> None:
    """The op and the fast path save the same number of tensors, including dropout's seed."""
    x = case.x.clone().requires_grad_(True)

    def call(x: Tensor) -> Tensor:
        return lora_sb_linear(x, case.weight, case.a, case.core, case.b, dropout=0.5)

    with FlopCounterMode(display=False):
        y = checkpoint(call, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
