"""What PEFT requires of every tuner, checked on the kinds of models that its users adapt."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import layers
from models import encoder, make, text
from networks import TARGETS, Mlp, Net, X, batch
from tolerances import EXACT, EXPORT, MERGE, check, check_scaled
from torch import Tensor, nn

import lorasb
from lorasb.layers.adapted_layer import AdaptedLayer


def bert(task: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return encoder("Bert", task, **more).eval()


def ids(**more: Any) -> dict[str, Any]:
    return {"input_ids": text(3, 10, 0)["input_ids"], **more}


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]  # the base, in evaluation mode, the same at every call
    targets: list[str]  # modules that are adapted
    task: str | None = None  # PEFT's task type
    read: str = "logits"  # the output field to compare, or "" if the output is a tensor
    inputs: Callable[[], dict[str, Any]] = ids  # keyword arguments of a forward

    def out(self, model: nn.Module) -> Tensor:
        result = model(**self.inputs())
        return getattr(result, self.read) if self.read else result


ATTENTION = ["query", "value"]
KINDS = {
    "decoder": Kind(lambda: make("llama"), ["q_proj", "v_proj", "up_proj"], "CAUSAL_LM"),
    "conv1d decoder": Kind(lambda: make("gpt2"), ["c_attn", "c_fc"], "CAUSAL_LM"),
    "encoder-decoder": Kind(
        lambda: make("t5"),
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
        inputs=lambda: ids(decoder_input_ids=text(3, 6, 1)["input_ids"]),
    ),
    "sequence classification": Kind(lambda: bert("ForSequenceClassification"), ATTENTION, "SEQ_CLS"),
    "token classification": Kind(lambda: bert("ForTokenClassification"), ATTENTION, "TOKEN_CLS"),
    "question answering": Kind(
        lambda: bert("ForQuestionAnswering", num_labels=2), ATTENTION, "QUESTION_ANS", "start_logits"
    ),
    "feature extraction": Kind(lambda: bert("Model"), ATTENTION, "FEATURE_EXTRACTION", "last_hidden_state"),
    "mlp": Kind(lambda: Mlp().eval(), ["first", "second"], read="", inputs=lambda: {"x": X}),
    "no linear": Kind(lambda: Net().eval(), TARGETS, read="", inputs=lambda: {"ids": batch()["ids"]}),
}

ORDINARY = {  # slow tests run on one kind per code path; the other kinds run in make test-all
    "test_a_compiled_model_computes_the_same": ("mlp",),
    "test_gradient_checkpointing_gives_the_same_gradients": ("decoder", "encoder-decoder", "token classification"),
    "test_an_adapter_has_any_name_and_the_file_has_none": ("mlp", "sequence classification", "no linear"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ordinary = ORDINARY.get(metafunc.function.__name__, tuple(KINDS))
    marks = {name: () if name in ordinary else pytest.mark.long for name in KINDS}
    metafunc.parametrize("kind", [pytest.param(kind, id=name, marks=marks[name]) for name, kind in KINDS.items()])


def config(kind: Kind, seed: int = 0, dropout: float = 0.0) -> lorasb.LoRASBConfig:
    """The config of an adapter that changes the output without initialization on data."""
    return lorasb.LoRASBConfig(
        r=3, target_modules=kind.targets, init="kaiming", init_seed=seed, task_type=kind.task, lora_dropout=dropout
    )


def adapted(kind: Kind, *names: str) -> Any:
    first, *others = names or ("default",)
    model = peft.get_peft_model(kind.make(), config(kind), adapter_name=first).eval()
    for seed, name in enumerate(others, 1):
        model.add_adapter(name, config(kind, seed))
    return model.eval()


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    """Check equality up to rounded weights and another order of sums, relative to the largest entry."""
    check_scaled(found.detach(), want.detach(), MERGE, least=1.0)


def layers_of(model: nn.Module) -> list[AdaptedLayer]:
    return list(layers(model, AdaptedLayer).values())


def trained(model: nn.Module) -> set[str]:
    """Names of the adapters whose R's train: all of an adapter's, or none."""
    found = {n.rpartition(".")[2] for n, p in model.named_parameters() if "lorasb_R" in n and p.requires_grad}
    for name in found:
        assert all(layer.lorasb_R[name].requires_grad for layer in layers_of(model) if name in layer.lorasb_R)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lorasb_A" in n or "lorasb_B" in n)
    return found


@pytest.mark.parametrize("name", ["my_adapter", "R2", "base_model"])
def test_an_adapter_has_any_name_and_the_file_has_none(kind: Kind, name: str, tmp_path: Path) -> None:
    model = adapted(kind, name)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(kind.make(), tmp_path / name).eval()  # as "default"
    check(kind.out(again), kind.out(model), EXACT)
    assert not any(key.endswith(f".{name}") for key in peft.get_peft_model_state_dict(model, adapter_name=name))


def test_a_file_has_the_config_and_loads_in_both_ways(kind: Kind, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    for cheap in (False, True):
        again = peft.PeftModel.from_pretrained(kind.make(), tmp_path, low_cpu_mem_usage=cheap).eval()
        check(kind.out(again), kind.out(model), EXACT)
        assert not any(p.is_meta for p in again.parameters())
        assert trained(again) == set()
    read = lorasb.LoRASBConfig.from_pretrained(tmp_path)
    for name in ("r", "target_modules", "init", "scaling", "rank_pattern", "peft_type", "bias", "layer_kinds"):
        assert getattr(read, name) == getattr(model.peft_config["default"], name), name
    assert read.inference_mode


def test_requires_grad_follows_every_call(kind: Kind) -> None:
    model = adapted(kind, "one", "two")
    assert trained(model) == {"one"}
    model.set_adapter("two")
    assert trained(model) == {"two"}
    if not model.peft_config["one"].modules_to_save:
        model.base_model.set_adapter(["one", "two"])
        assert trained(model) == {"one", "two"}
    model.set_adapter("one")
    with model.disable_adapter():
        assert trained(model) <= {"one"}
    assert trained(model) == {"one"}
    model.set_adapter("two", inference_mode=True)
    assert trained(model) == set()


def test_active_adapters_go_together_and_merge_in_every_combination(kind: Kind) -> None:
    model = adapted(kind, "one", "two", "three")
    if model.peft_config["one"].modules_to_save:
        pytest.skip("PEFT allows one active adapter where a head or a pooler is trained in full")
    outputs = {}
    for count in (1, 2, 3):
        for chosen in itertools.combinations(("one", "two", "three"), count):
            model.base_model.set_adapter(list(chosen))
            outputs[chosen] = kind.out(model)
    distinct = list(outputs.values())
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.combinations(distinct, 2))
    for chosen, want in outputs.items():
        model.base_model.set_adapter(list(chosen))
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already merged|nothing to do"):
            model.merge_adapter()
        same(kind.out(model), want)
        model.unmerge_adapter()
        same(kind.out(model), want)
        plain = copy.deepcopy(model).merge_and_unload(adapter_names=list(chosen))
        same(kind.out(plain), want)
        assert [type(module) for module in plain.modules()] == [type(module) for module in kind.make().modules()]
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    same(kind.out(model), outputs["one", "two"])


@torch.no_grad()  # frozen weights may send attention through another kernel
def test_a_disabled_adapter_is_the_base_in_contexts_that_nest(kind: Kind) -> None:
    model, base = adapted(kind), kind.out(kind.make())
    want = kind.out(model)
    assert (want - base).abs().max() > 1e-3
    with model.disable_adapter():
        check(kind.out(model), base, EXACT)
        with model.disable_adapter():
            check(kind.out(model), base, EXACT)
        check(kind.out(model), base, EXACT)
    check(kind.out(model), want, EXACT)


def test_deleted_adapters_leave_the_others(kind: Kind) -> None:
    model = adapted(kind, "two", "one")
    model.set_adapter("one")
    want = kind.out(model)
    model.delete_adapter("two")
    check(kind.out(model), want, EXACT)
    for layer in layers_of(model):
        assert all(set(getattr(layer, name)) == {"one"} for name in ("lorasb_R", *layer.other_param_names))


@torch.no_grad()  # frozen weights may send attention through another kernel
def test_unloading_gives_the_base_back(kind: Kind) -> None:
    base = kind.make()
    want, names = kind.out(base), list(base.state_dict())
    plain = peft.get_peft_model(base, config(kind)).unload()
    assert list(plain.state_dict()) == names
    check(kind.out(plain.eval()), want, EXACT)


def test_injection_and_state_dicts_work_below_peft_model(kind: Kind) -> None:
    model = peft.inject_adapter_in_model(config(kind), kind.make(), adapter_name="x").eval()
    state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model, adapter_name="x").items()}
    other = peft.inject_adapter_in_model(config(kind, seed=7), kind.make(), adapter_name="y").eval()
    assert (kind.out(other) - kind.out(model)).abs().max() > 1e-4
    result = peft.set_peft_model_state_dict(other, state, adapter_name="y")
    assert not result.unexpected_keys
    same(kind.out(other), kind.out(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind: Kind, reentrant: bool) -> None:
    found, bound = [], EXACT if kind is KINDS["decoder"] else EXPORT  # GPT-2 and T5 add up in another order
    for checkpointing in (False, True):
        model: Any = peft.get_peft_model(kind.make(), config(kind, dropout=0.25)).train()
        if not hasattr(model.get_base_model(), "gradient_checkpointing_enable"):
            pytest.skip("only transformers models have it")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        kind.out(model).float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("lorasb_R" in name and gradient.norm() > 0 for name, gradient in found[0].items())
    assert found[0].keys() == found[1].keys()
    check(*(list(gradients.values()) for gradients in found), bound)


def test_a_compiled_model_computes_the_same(kind: Kind) -> None:
    torch._dynamo.reset()
    model = adapted(kind)
    want = kind.out(model)
    compiled = torch.compile(model, backend="eager")
    check(kind.out(compiled), want, EXPORT)
    with torch.no_grad():
        check(kind.out(compiled), want, EXPORT)
