"""Private names of other packages: installed versions have them, and without any one the results are the same."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.modeling_utils as core_model_loading
from linear_groups import same, step
from models import make, patched
from peft.tuners import tuners_utils
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import fully_sharded_data_parallel
from triton.runtime import jit

import lorasb
from lorasb import compat
from lorasb.compat import Private
from lorasb.compat import accelerate as private_accelerate
from lorasb.compat import bitsandbytes as private_bitsandbytes
from lorasb.compat import peft as private_peft
from lorasb.compat import torch as private_torch
from lorasb.compat import transformers as private_transformers
from lorasb.compat import triton as private_triton
from lorasb.kernels.block_sizes import GemmConfig
from lorasb.kernels.launcher import Launch
from lorasb.layers.adapted_layer import AdaptedLayer
from lorasb.tuner.model import LoRASBModel

MODULES = (private_torch, private_transformers, private_peft, private_triton, private_bitsandbytes, private_accelerate)
HEADERS = [one.name for one in private_torch.PRIVATE.values() if one.name.endswith(".h")]
NAMES = [(m, name) for m in MODULES for name, one in m.PRIVATE.items() if not {"(", "/"} & set(one.name)]
ATTRIBUTES = [(m, name) for m in MODULES for name, one in m.PRIVATE.items() if "()" in one.name]
SOURCES = {
    "packing_format": lambda bnb: bnb.functional,
    "loaded": lambda _: core_model_loading,
    "device_caches": lambda _: jit,
    "driver": lambda _: sys.modules["triton.runtime.driver"],  # the attribute is the driver object
    private_torch.FSDP: lambda _: fully_sharded_data_parallel,
}
GONE = object()
FALLBACKS = {name: one.fallback for name, one in private_torch.PRIVATE.items() if one.fallback is not None}


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda one: getattr(one, "__name__", one))
def test_the_installed_version_has_the_name(module: ModuleType, name: str) -> None:
    assert compat.find(module.PRIVATE[name]._replace(fallback=GONE)) is not GONE


@pytest.mark.parametrize(("name", "expected"), [("triton", (3, 9)), ("pytorch-triton", (3, 9)), ("other", (0, 0))])
def test_triton_under_any_name_of_its_package(name: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError(asked)
        return "3.9.0+git1a2b"

    monkeypatch.setattr(private_triton, "version", version)
    assert private_triton.installed.__wrapped__() == expected


@pytest.mark.parametrize("name", HEADERS)
def test_the_installed_torch_has_the_header(name: str) -> None:
    assert (Path(torch.__file__).parent / "include" / name).is_file()


@pytest.mark.parametrize(
    ("ours", "theirs"), [(LoRASBModel, tuners_utils.BaseTuner), (AdaptedLayer, tuners_utils.BaseTunerLayer)]
)
def test_every_overridden_hook_is_listed(ours: type, theirs: type) -> None:
    found = {name for name in vars(ours) if re.match("_[a-z]", name) and callable(getattr(theirs, name, None))}
    listed = {one.name.rpartition(".")[2] for one in private_peft.PRIVATE.values()}
    assert found
    assert found <= listed


@pytest.mark.parametrize("name", ["no_such_package.name", "torch.no_such_module.name", "torch._C._no_such_name"])
def test_a_name_that_is_gone_gives_the_fallback(name: str) -> None:
    assert compat.find(Private(name, "", "", GONE)) is GONE


@pytest.fixture(scope="module")
def calls() -> list[Callable[[], Any]]:
    """A training step of a model; and y of a layer with one adapter, then with one per row, without gradients."""
    model, layer, x = patched("llama"), lorasb.LoRASBLinear(nn.Linear(24, 16), "one", r=4), torch.randn(3, 5, 24)
    with torch.no_grad():
        layer.lorasb_R["one"].normal_()
        layer.set_factors("one", torch.randn(16, 4), torch.randn(4, 4), torch.randn(4, 24))

    @torch.no_grad()
    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x), layer(x, adapter_names=["one", "__base__", "one"])

    return [lambda: step(model), rows]


@pytest.fixture(scope="module")
def results(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


@pytest.mark.parametrize("name", FALLBACKS)
def test_without_the_name_results_are_the_same(
    name: str, calls: list[Callable[[], Any]], results: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_torch, name, FALLBACKS[name])
    same(calls[0](), results[0])
    torch.testing.assert_close(calls[1](), results[1])


def test_without_fake_tensors_the_planner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_torch, "find", lambda private: private.fallback)
    with pytest.raises(ImportError, match=r"expected .*FakeTensorMode, which this torch lacks: install torch"):
        private_torch.fake_tensor_mode()


def test_without_forward_mode_there_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_torch, "forward_ad", object())
    assert private_torch.forward_level() == -1


def test_without_pefts_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, one in private_peft.PRIVATE.items():
        if one.fallback is not None:
            monkeypatch.setattr(private_peft, name, one.fallback)
    assert private_peft.in_out_features(nn.Linear(3, 5)) == (3, 5)
    expected: Any = {"q_proj", "v_proj"}
    assert lorasb.patch(make("llama"), r=4, target_modules=expected).peft_config["default"].r == 4
    with pytest.raises(ValueError, match="name the modules"):
        lorasb.patch(make("llama"), r=4, target_modules="all-linear")


def test_instances_have_the_attributes() -> None:
    """Checked on objects that the packages make, or in their sources; DeepSpeed's is in its documentation only."""
    import accelerate
    import transformers
    from quantized_models import to_bitsandbytes

    bnb = pytest.importorskip("bitsandbytes")
    model: Any = make("llama")
    offloaded = accelerate.cpu_offload(nn.Linear(2, 2), execution_device="cpu")
    quantized = to_bitsandbytes(nn.Linear(64, 64), "nf4")
    model.gradient_checkpointing_enable()
    made = {
        "checkpointing": model.model.layers[0],
        "name_or_path": model.config,
        "n_gpu": transformers.TrainingArguments("unused", use_cpu=True),
        "same_widths": nn.MultiheadAttention(4, 2),
        "forward_hooks": nn.Linear(2, 2),
        "OptimizedModule": torch.compile(nn.Linear(2, 2)),
        "supports_repacking": quantized,
        "hook": offloaded,
        "torch.nn.Module()._parameters": nn.Linear(2, 2),
        "torch.nn.Module()._modules": nn.Linear(2, 2),
    }
    for name in ("_adapters", "_active_adapter"):
        made[f"peft.utils.other.AuxiliaryTrainingWrapper().{name}"] = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    for module, name in ATTRIBUTES:
        attribute = module.PRIVATE[name].name.partition("().")[2]
        if name in made:
            assert hasattr(made[name], attribute), f"{module.__name__}: {attribute}"
        elif name in SOURCES:
            assert attribute in inspect.getsource(SOURCES[name](bnb)), f"{module.__name__}: {attribute}"
        else:
            assert name == "ds_id"


def test_what_transformers_loads_is_marked(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    found = type(make("llama")).from_pretrained(tmp_path)
    assert all(map(private_transformers.is_loaded, found.parameters()))
    assert not any(map(private_transformers.is_loaded, make("llama").parameters()))


@pytest.mark.parametrize(
    ("version", "verified"), [("3.5.1", False), ("3.6.0", True), ("3.9.0", True), ("3.10.0", False), ("4.0", False)]
)
def test_launches_are_prepared_with_tested_versions_of_triton_alone(
    version: str, verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_triton, "version", lambda package: version)
    monkeypatch.setattr(private_triton, "installed", private_triton.installed.__wrapped__)
    assert private_triton.is_verified.__wrapped__() is verified


def test_experts_of_another_kind_are_told_apart() -> None:
    """transformers' flags decide: experts with other layouts, biases or gates keep their own forward."""
    experts: Any = make("mixtral").get_submodule("model.layers.0.mlp.experts")
    assert private_transformers.computes_like_mixtral(experts)
    changes = [(experts, flag, not value) for flag, value in private_transformers.LIKE_MIXTRAL.items()]
    for holder, name, value in (*changes, (type(experts), "_apply_gate", lambda self, x: x)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, name, value, raising=False)
            assert not private_transformers.computes_like_mixtral(experts), name


def test_without_a_card_no_fence_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_card() -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(get_current_target=no_card)))
    monkeypatch.setattr(private_triton, "installed", lambda: (3, 6))
    assert not private_triton.omits_fences()


@pytest.mark.parametrize(("version", "arch", "omitted"), [((3, 6), 90, True), ((3, 6), 86, False), ((3, 7), 90, False)])
def test_fences_that_triton_omits(
    version: tuple[int, int], arch: int, omitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop gets only one stage if its copies would feed wgmma without a fence."""
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch))
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=target))
    monkeypatch.setattr(private_triton, "installed", lambda: version)
    assert private_triton.omits_fences() is omitted
    options = Launch(SimpleNamespace(device_caches={}), 1, {}, GemmConfig(64, 64, 32, 8, 4, 3)).options
    assert options["num_stages"] == (1 if omitted else 3)


@pytest.mark.parametrize("version_is_known", [True, False])
@pytest.mark.parametrize("hook", [None, SimpleNamespace(calls=[]), SimpleNamespace(calls=[print]), print])
def test_launches_that_something_observes_are_ordinary(
    hook: Any, version_is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools add hooks to a chain, or replace it with a function. An unknown Triton version may have other hooks."""
    hooks = SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(private_triton, "is_verified", lambda: version_is_known)
    monkeypatch.setattr(private_triton, "_runtime", lambda: hooks if version_is_known else pytest.fail("asked"))
    observed = hook is print or (hook is not None and bool(hook.calls))
    private_triton.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert private_triton.may_repeat(SimpleNamespace(device_caches={})) is (version_is_known and not observed)
    line = "another tool observes" if version_is_known else "lorasb was tested with Triton 3.6 to 3.9"
    expected = [line] if observed or not version_is_known else []
    assert [str(one.message)[: len(line)] for one in said] == expected  # one warning for two calls
    assert not private_triton.may_repeat(print)  # interpreted: no warning
