"""What all adapted layers share: bases, scales, R in 16 bits, Theorem 3's gradient, and finding them in a model."""

from typing import Any

import pytest
import torch
from adapters import layers, unchanged
from models import make, patched
from tolerances import EXACT, FP64, check, fp32
from torch import Tensor, nn

import lorasb
from lorasb.layers import linear, lookup
from lorasb.layers.adapter_state import Rows, rows_of
from lorasb.layers.linear import LoRASBLinear

SHAPES = ((12, 4), (4, 4), (4, 16))  # B, R, A


def layer_with(*names: str, **options: Any) -> LoRASBLinear:
    """A linear whose adapters have different values."""
    layer = LoRASBLinear(nn.Linear(16, 12, dtype=torch.float64), names[0], 4, **options)
    for seed, name in enumerate(names):
        if seed:
            layer.add_adapter(name, 4, **options)
        g = torch.Generator().manual_seed(seed)
        layer.set_factors(name, *(torch.randn(*shape, generator=g, dtype=torch.float64) * 0.3 for shape in SHAPES))
    return layer


def factors(layer: LoRASBLinear, name: str) -> tuple[Tensor, Tensor, Tensor]:
    return layer.lorasb_B[name].detach(), layer.lorasb_R[name].detach(), layer.lorasb_A[name].detach()


def output(layer: LoRASBLinear, name: str, x: Tensor, core: Tensor | None = None) -> Tensor:
    """The output with one adapter, by its definition."""
    b, own, a = factors(layer, name)
    base = layer.get_base_layer()
    return base(x) + layer.adapters[name].scaling * x @ a.t() @ (own if core is None else core).t() @ b.t()


def test_an_adapter_moves_to_a_basis_and_leaves_it() -> None:
    layer = layer_with("one", "two", scaling=2.0)
    layer.adapters["one"].scaling = 3.0  # changed since it was made
    layer.lorasb_R["two"].requires_grad_(True)
    core = torch.randn(4, 4, dtype=torch.float32)
    layer.move_to_basis("two", "one", core)
    assert layer.bases == {"two": "one"}
    assert layer.lorasb_A["two"] is layer.lorasb_A["one"]
    assert layer.lorasb_B["two"] is layer.lorasb_B["one"]
    assert layer.lorasb_R["two"].requires_grad
    assert layer.lorasb_R["two"].dtype == torch.float64
    assert (layer.scaling["two"], layer.adapters["two"].made_with) == (2.0, 2.0)
    x = torch.randn(5, 16, dtype=torch.float64)
    before = output(layer, "two", x, core.double())
    layer.set_adapter(["two"])
    check(layer(x), before, FP64)
    for _ in range(2):  # the second time changes nothing
        layer.leave_basis("two")
        assert not layer.bases
        assert not layer.lorasb_A["two"].requires_grad
    layer.lorasb_A["one"].data.zero_()
    layer.lorasb_B["one"].data.zero_()
    check(layer(x), before, FP64)


def test_an_adapter_starts_at_a_copy_of_anothers_r_and_follows_its_basis() -> None:
    layer = layer_with("one")
    layer.add_adapter("two", 4, basis="one", start_at="one")
    assert layer.is_initialized("two")
    check(layer.lorasb_R["two"], layer.lorasb_R["one"], EXACT)
    layer.lorasb_R["one"].data.zero_()
    assert layer.lorasb_R["two"].norm() > 0
    for change in (lambda: layer.to(torch.bfloat16), lambda: layer.cast_factors("two")):
        layer.lorasb_A["two"] = nn.Parameter(layer.lorasb_A["two"].detach().float())  # as a loader assigns it
        change()
        assert layer.lorasb_A["two"] is layer.lorasb_A["one"]


def test_scales() -> None:
    layer = layer_with("one", "two", scaling=2.0)
    layer.set_adapter(["one"])
    layer.scale_layer(3.0)
    x = torch.randn(3, 16, dtype=torch.float64)
    check(layer(x), output(layer, "one", x), FP64)
    assert layer.scaling == {"one": 6.0, "two": 2.0}
    layer.unscale_layer(2.0)
    assert layer.scaling == {"one": 3.0, "two": 2.0}
    layer.unscale_layer()
    layer.set_scale("two", 0.5)
    layer.set_scale("no adapter of this layer", 0.5)
    assert layer.scaling == {"one": 2.0, "two": 1.0}


def test_a_merged_adapter_keeps_its_scale() -> None:
    layer = layer_with("one", "two")
    layer.merge(adapter_names=["one"])
    layer.set_adapter(["one"])
    layer.set_scale("two", 2.0)  # not merged
    scales = layer.scaling
    changes = (
        lambda: layer.set_scale("one", 2.0),
        lambda: layer.scale_layer(2.0),
        lambda: layer.unscale_layer(),
        lambda: scales.__setitem__("one", 2.0),
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"'one' is merged into the weights: call model.unmerge_adapter"):
            change()
    assert layer.scaling == scales == {"one": 1.0, "two": 2.0}


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    layer = layer_with("one")
    layer.lorasb_R["one"].data[0, 0] = float("inf")
    message = r"adapter one seems to be broken: .*not finite in torch.float64"
    with unchanged(layer), pytest.raises(ValueError, match=message):
        layer.merge()


def test_theorem_3s_matrices_are_kept_until_the_scale_changes() -> None:
    layer = layer_with("one", equivalent_gradient=True)
    kept = layer.preconditioner("one")
    assert layer.preconditioner("one")[0] is kept[0]
    layer.adapters["one"].scaling = 2.0
    check(layer.preconditioner("one")[0], kept[0] / 4, FP64)


def test_r_in_16_bits_computes_in_fp32() -> None:
    layer = LoRASBLinear(nn.Linear(16, 12), "one", 4)
    layer.set_factors("one", *(torch.randn(*shape) * 0.3 for shape in SHAPES))
    layer.lorasb_R._parameters["one"] = nn.Parameter(layer.lorasb_R["one"].detach().bfloat16())  # past its cast
    assert layer.core("one").dtype == torch.float32
    layer(x := torch.randn(3, 16)).sum().backward()
    assert layer.lorasb_R["one"].grad.dtype == torch.bfloat16
    b, core, a = (one.double() for one in factors(layer, "one"))
    base = layer.get_base_layer()
    weight = base.weight.double() + b @ core @ a
    check(layer(x), x.double() @ weight.t() + base.bias.double(), fp32(32))


@pytest.mark.parametrize(
    ("names", "x", "outer", "tokens_first", "want"),
    [
        ("ab", torch.zeros(2, 3, 5), None, False, [0, 1]),
        ("ab", torch.zeros(6, 5), (2, 3), False, [0, 0, 0, 1, 1, 1]),  # flattened
        ("ab", torch.zeros(2, 5), (2, 3), False, [0, 1]),  # pooled
        ("ab", torch.zeros(4, 5), (2, 3), False, None),  # some tokens: nobody knows whose
        ("ab", torch.zeros(4, 3, 5), None, False, None),
        ("ab", torch.zeros(2, 2, 5), None, True, None),  # [B, T, in] or [T, B, in]
        ("ab", torch.zeros(2, 2, 5), None, False, [0, 1]),  # B = T: a transpose shows in the strides
        ("ab", torch.zeros(2, 2, 5).transpose(0, 1), None, False, None),
        ("aa", torch.zeros(5, 8), None, False, [0] * 5),  # one adapter fits any order of tokens
        ("aa", torch.zeros(3, 2, 8), None, True, [0] * 3),
        ("aa", torch.zeros(4, 2, 8), None, False, [0] * 4),
        ("aa", torch.zeros(3, 2, 8), None, False, None),
    ],
)
def test_rows_of_an_input_are_known_or_none_are(
    names: str, x: Tensor, outer: tuple[int, int] | None, tokens_first: bool, want: list[int] | None
) -> None:
    found = rows_of(x, Rows.of(list(names)), outer and torch.Size(outer), tokens_first)
    assert (found if found is None else found.index.tolist()) == want


def test_rows_of_a_bank_are_listed_as_its_basis() -> None:
    rows = Rows(("a", "b", "c"), torch.tensor([2, 0, 1]), torch.tensor([-1, 3, 0]), "basis")
    assert rows.places.tolist() == [0, -1, 3]
    assert rows.others == ("a",)
    assert rows.to_list() == ["basis", "a", "basis"]
    assert rows.select(torch.tensor([1, 1])).to_list() == ["a", "a"]


def test_rows_on_a_base_that_runs_itself_and_rows_without_adapters_get_theirs() -> None:
    layer = layer_with("one", "two")
    x = torch.randn(3, 16, dtype=torch.float64)
    want = torch.stack([output(layer, "two", x[0]), output(layer, "one", x[1]), output(layer, "two", x[2])])
    check(linear.forward(layer, x, ["two", "one", "two"]), want, FP64)
    check(linear.forward(layer, x, ["two"] * 3), output(layer, "two", x), FP64)
    layer.move_to_basis("two", "one", layer.lorasb_R["two"].detach())
    want = torch.stack([output(layer, "two", x[0]), output(layer, "one", x[1]), layer.get_base_layer()(x[2])])
    for _ in range(2):
        check(linear.forward(layer, x, ["two", "one", "__base__"]), want, FP64)
        layer.get_base_layer().register_forward_hook(lambda module, args, y: y)  # now the base must run
    layer.enable_adapters(False)
    check(linear.forward(layer, x, ["two", "one", "two"]), layer.get_base_layer()(x), FP64)


def test_rows_of_another_number_or_of_a_merged_layer_are_refused() -> None:
    layer = layer_with("one")
    with pytest.raises(ValueError, match=r"got 1 and 3 respectively: give one name per row"):
        layer.checked_rows(torch.zeros(3, 16), ["one"])
    layer.merge()
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when there are merged adapters"):
        layer.checked_rows(torch.zeros(1, 16), ["one"])


def test_one_call_trains_adapters_on_one_basis_and_scale_without_own_gradients() -> None:
    layer = layer_with("one", "two", "three")
    assert linear.trains_by_row(layer, ["an adapter that it lacks"])
    assert not linear.trains_by_row(layer, ["one", "two"])
    layer.move_to_basis("two", "one", layer.lorasb_R["two"].detach())
    assert linear.trains_by_row(layer, ["one", "two"])
    assert not linear.trains_by_row(layer, ["one", "two", "three"])
    state = layer.adapters["two"]
    for name, value in (("scaling", 2.0), ("equivalent_gradient", True), ("lora_dropout", 0.1)):
        usual = getattr(state, name)
        setattr(state, name, value)
        assert not linear.trains_by_row(layer, ["one", "two"]), name
        setattr(state, name, usual)
    state.lora_dropout = 0.1
    assert linear.trains_by_row(layer.eval(), ["one", "two"])


def test_one_of_two_adapters_is_discarded_and_the_last_leaves_the_plain_model() -> None:
    model = patched(modules_to_save=["norm"])
    plain = make("llama")
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, init="random", modules_to_save=["norm"]))
    lookup.discard(model, "second")
    assert list(model.peft_config) == ["default"]
    assert all(set(layer.lorasb_R) == {"default"} for layer in layers(model).values())
    assert set(model.base_model.model.model.norm.modules_to_save) == {"default"}
    base = model.base_model.model
    lookup.discard(base, "default")
    assert [name for name, _ in base.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_failure_restores_adapters_flags_and_modules() -> None:
    model = patched()

    def broken() -> None:
        with lookup.unchanged_on_error(model):
            for layer in layers(model).values():
                layer.add_adapter("second", 2)
                layer.set_adapter(["second"])
            model.base_model.model.extra = nn.Linear(2, 2)
            model.base_model.model.lm_head.requires_grad_(True)
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        broken()
