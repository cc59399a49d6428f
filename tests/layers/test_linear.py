"""The layer: what it refuses, what it keeps frozen, several adapters, merging."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import tolerances
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from adapters import unchanged
from basis_models import fill
from measuring import allocations
from models import patched
from torch import Tensor, nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def make(dtype: torch.dtype = torch.float32, initialized: bool = True, **options: object) -> LoRASBLinear:
    torch.manual_seed(0)
    layer = LoRASBLinear(nn.Linear(16, 12, dtype=dtype), "default", 4, **options)
    if initialized:
        g = torch.Generator().manual_seed(1)
        layer.set_factors("default", *(torch.randn(*s, generator=g) * 0.3 for s in ((12, 4), (4, 4), (4, 16))))
    return layer


def by_hand(layer: LoRASBLinear, x: Tensor) -> Tensor:
    a, core, b = (getattr(layer, f"lorasb_{part}")["default"].double() for part in "ARB")
    weight = layer.base.parameter().double() + layer.scaling["default"] * b @ core @ a
    return x.double() @ weight.t() + layer.bias.double()


@pytest.mark.parametrize("name", ["made_with", "dropout"])
def test_what_is_no_option_of_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make(**{name: True})


def test_an_uninitialized_layer_is_the_base_and_refuses_to_train() -> None:
    layer = make(initialized=False)
    x = torch.randn(3, 16)
    y = layer.eval()(x)
    assert torch.equal(y, layer.base_layer(x))
    with pytest.raises(RuntimeError, match="has not been initialized"):
        y.sum().backward()
    layer.train()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(RuntimeError, match=r"has not been initialized.*lorasb\.initialize\(model, dataloader, lr="):
        layer(x)


def test_what_trained_before_adapters_were_off_trains_again() -> None:
    layer = make()
    layer.add_adapter("second", 4)
    layer.set_adapter(["default"])
    layer.lorasb_R["second"].requires_grad_(True)  # as for adapters that train together
    for _ in range(2):
        layer.enable_adapters(False)
        assert not any(core.requires_grad for core in layer.lorasb_R.values())
    layer.enable_adapters(True)
    assert all(core.requires_grad for core in layer.lorasb_R.values())
    layer.enable_adapters(False)
    layer.set_adapter(["second"])
    layer.enable_adapters(True)
    assert not layer.lorasb_R["default"].requires_grad
    layer.set_adapter(["default"])
    layer.enable_adapters(False)
    layer.delete_adapter("second")
    layer.enable_adapters(True)
    assert layer.lorasb_R["default"].requires_grad


def test_outputs_may_be_written_in_place() -> None:
    layer, x = make(), torch.randn(2, 5, 16, requires_grad=True)
    layer(x).relu_().sum().backward()
    gradient = layer.lorasb_R["default"].grad.clone()
    layer.zero_grad()
    layer(x).relu().sum().backward()
    assert torch.equal(layer.lorasb_R["default"].grad, gradient)


def test_casting_a_layer_leaves_r_in_fp32_and_input_in_another_dtype_is_cast_back() -> None:
    layer = make()
    before = layer.lorasb_R["default"].detach().clone()
    for dtype in (torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.lorasb_A["default"].dtype == dtype
        assert layer(torch.randn(3, 16)).dtype == torch.float32
        assert torch.equal(layer.lorasb_R["default"], before)
    layer.lorasb_R["default"] = nn.Parameter(before.bfloat16())  # as a loader assigns it
    assert layer.lorasb_R["default"].dtype == torch.float32


@pytest.mark.parametrize("cast", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_cast_model_computes_whatever_its_base(cast: torch.dtype, bits: int) -> None:
    """A quantized base keeps its dtype, and so do A and B."""
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    if bits == 4:
        lorasb.quantize(model)
    layer = lorasb.patch(model, r=4, init="random", target_modules=["0"]).base_model.model.to(cast)[0]
    assert layer.lorasb_A["default"].dtype == layer.base.dtype == (torch.bfloat16 if bits == 4 else cast)
    assert layer(torch.randn(3, 64, dtype=cast)).isfinite().all()


def test_a_cast_keeps_the_parameter_of_r_whatever_its_dtype() -> None:
    """Optimizers hold a reference to it."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)),
        lorasb.LoRASBConfig(r=2, init="random", target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    core = model.base_model.model[0].lorasb_R["default"]
    model.bfloat16()
    assert model.base_model.model[0].lorasb_R["default"] is core


def test_r_is_cast_unless_only_frozen_factors_are() -> None:
    layer = make()
    layer.lorasb_R["default"] = nn.Parameter(layer.lorasb_R["default"].detach().double())
    layer.cast_factors("default", frozen_alone=True)
    assert layer.lorasb_R["default"].dtype == torch.float64
    layer.cast_factors("default")
    assert layer.lorasb_R["default"].dtype == torch.float32


def test_r_is_in_16_bits_only_on_request() -> None:
    layer = make().bfloat16()
    for wide, dtype in ((False, torch.bfloat16), (None, torch.bfloat16), (True, torch.float32), (None, torch.float32)):
        layer.cast_factors("default", wide_core=wide)
        assert layer.lorasb_R["default"].dtype == dtype


def test_a_base_that_was_merged_while_it_was_cast_computes() -> None:
    model = lorasb.patch(lorasb.quantize(nn.Sequential(nn.Linear(64, 64))), r=4, init="random", target_modules=["0"])
    model.merge_adapter()
    assert not any(parameter.requires_grad for parameter in model.base_model.model[0].get_base_layer().parameters())
    model.half()
    model.unmerge_adapter()
    layer = model.base_model.model[0]
    assert layer(torch.randn(2, 64, dtype=layer.base.dtype)).isfinite().all()


def test_a_probed_layer_casts_its_factors() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    layer = lorasb.patch(nn.Sequential(Own(8, 8)), r=2, init="random", target_modules=["0"]).base_model.model[0]
    for dtype in (torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert layer.lorasb_A["default"].dtype == layer.base.dtype == dtype


def test_wide_factors_stay_in_fp32_to_the_bit() -> None:
    layer = make(wide_factors=True)
    before = [one["default"].clone() for one in (layer.lorasb_A, layer.lorasb_B)]
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)
        assert all(
            torch.equal(one["default"], old) for one, old in zip((layer.lorasb_A, layer.lorasb_B), before, strict=True)
        )
    assert layer(torch.randn(3, 16, dtype=dtype)).dtype == dtype


def test_data_parallel_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match=r"do not run in nn.DataParallel, .*: start one process per GPU"):
        make()._replicate_for_data_parallel()


def test_the_adapters_product_is_added_onto_the_bases_and_takes_no_memory_of_that_size() -> None:
    layer, x, dy = make(), torch.randn(700, 16, requires_grad=True), torch.randn(700, 12)
    with lorasb.backend("eager"):
        with allocations() as forward:
            y = layer(x)
        with allocations() as backward:
            y.backward(dy)
    assert max(forward) < 2 * y.nbytes
    assert max(backward) < 2 * x.nbytes


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_initializes(assign: bool) -> None:
    source, target = make(), make(initialized=False)
    target.load_state_dict({"lorasb_R.default": torch.eye(4)}, strict=False)
    assert not target.is_initialized("default")  # a part is not enough
    target.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(3, 16)
    assert torch.equal(source(x), target.train()(x))
    assert [n for n, p in target.named_parameters() if p.requires_grad and "lorasb" in n] == ["lorasb_R.default"]


def test_ranks_that_a_layer_cannot_have_a_taken_name_and_factors_of_another_shape_change_nothing() -> None:
    layer = make()
    with unchanged(layer):
        for r in (0, -1, 13):
            with pytest.raises(ValueError, match=rf"expected 0 < r <= min\(in, out\) = 12, got {r}"):
                layer.add_adapter("second", r)
        with pytest.raises(ValueError, match="has an adapter 'default' already"):
            layer.add_adapter("default", 2)
        with pytest.raises(ValueError, match=r"expected a factor \[4, 16\], got \[4, 15\]"):
            layer.set_factors("default", torch.ones(12, 4), torch.ones(4, 4), torch.ones(4, 15))


class Plus(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class PlusHook(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda base: base.register_forward_hook(lambda module, args, y: y + 1),
    "pre-hook": lambda base: base.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "another class": lambda base: setattr(base, "__class__", Plus),
    "own forward": lambda base: setattr(base, "forward", lambda x, plain=base.forward: plain(x) + 1),
    "accelerate": lambda base: add_hook_to_module(base, PlusHook()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_must_run_is_run(change: str) -> None:
    layer, x = make(), torch.randn(5, 16)
    CHANGES[change](layer.base_layer)
    plus = x.double() @ layer.base.parameter().double().t() if change == "pre-hook" else 1
    tolerances.check(layer(x), by_hand(layer, x) + plus, tolerances.fp32(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge_and_unmerge(dtype: torch.dtype) -> None:
    layer = make(dtype)
    assert {getattr(layer, f"lorasb_{part}")["default"].dtype for part in "ARB"} == {dtype}
    x, before = torch.randn(5, 16, dtype=dtype), layer.base.parameter().detach().clone()
    want = layer(x)
    layer.merge()
    tolerances.check(layer(x), want, tolerances.MERGE)
    layer.unmerge()
    tolerances.check(layer.base.parameter(), before, tolerances.MERGE)
    tolerances.check(layer(x), want, tolerances.MERGE)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_autocast_over_an_fp32_base() -> None:
    layer, x = make(), torch.randn(6, 16, requires_grad=True)
    weight = layer.base.parameter().detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lorasb_R["default"].grad.dtype == x.grad.dtype == torch.float32
    layer.merge()
    layer.enable_adapters(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # unmerges the layer
        layer(x)
    assert not layer.merged
    tolerances.check(layer.base.parameter(), weight, tolerances.fp32(16))


def test_dropout_acts_in_training_only() -> None:
    layer, x = make(lora_dropout=0.5), torch.randn(5, 16)
    layer.eval()
    tolerances.check(layer(x), by_hand(layer, x), tolerances.fp32(32))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_a_model_on_the_meta_device_computes_shapes() -> None:
    model = patched().to("meta")
    assert model(input_ids=torch.zeros(2, 3, dtype=torch.long, device="meta")).logits.shape[:2] == (2, 3)


def test_dictionaries_by_adapter_name() -> None:
    layer = make()
    layer.scaling["default"] = 3.0  # as in PEFT's layers
    assert layer.adapters["default"].scaling == layer.scaling["default"] == 3.0
    with pytest.raises(TypeError):
        layer.r["default"] = 2  # type: ignore[index]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
def test_a_weight_that_is_computed_is_adapted_and_not_merged(norm: Callable[[nn.Linear], nn.Module]) -> None:
    net = nn.Sequential(OrderedDict(normed=norm(nn.Linear(16, 12)), plain=nn.Linear(12, 8)))
    model = lorasb.patch(net, r=4, init="kaiming", target_modules=["normed", "plain"])
    fill(model, "default", 0)
    x = torch.randn(3, 16)
    before = model(x)
    with model.disable_adapter():
        assert (model(x) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"computes its weight in every forward .* remove that first"):
        model.merge_adapter()
    tolerances.check(model(x), before, tolerances.EXACT)


def test_another_base_layer_has_the_settings_of_the_one_before() -> None:
    layer = LoRASBLinear(nn.Linear(16, 12), "default", 4)
    layer.base.trains_bias, layer.cast_input_dtype_enabled = True, False
    layer.base_layer = nn.Linear(16, 12, dtype=torch.bfloat16)
    assert layer.base.module is layer.base_layer
    assert layer.base.dtype == torch.bfloat16
    assert layer.base.trains_bias
    assert not layer.cast_input_dtype_enabled


def test_a_dense_call_is_in_few_files_and_nested_calls(composed: bool) -> None:
    """docs/architecture.md states these numbers."""
    layer, files, stack, depths = make(), set(), [0], []
    layer.base_layer.requires_grad_(False)

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if is_ours := "/lorasb/" in frame.f_code.co_filename:
            files.add(Path(frame.f_code.co_filename).relative_to(Path(lorasb.__file__).parent).as_posix())
        if event == "call":
            stack.append(stack[-1] + is_ours)
        elif event == "return":
            stack.pop()
        elif event == "c_call" and getattr(argument, "__name__", "") == "linear":
            depths.append(stack[-1])

    for _ in range(2):  # the first call of a signature is checked
        files.clear()
        sys.setprofile(watch)
        try:
            layer(torch.randn(3, 16, requires_grad=True)).sum().backward()
        finally:
            sys.setprofile(None)
    assert "layers/linear.py" in files
    assert len(files) <= 8
    assert not composed or set(depths) == {5}  # otherwise, the C++ extension may compute the products
