"""q/k/v and gate/up in one call: launches, equality with single layers, and every reason to stay alone."""

from __future__ import annotations

import pytest
import tolerances
import torch
from linear_groups import alone, attention, groups, prepared, same, step
from models import batches_for, patched
from torch import Tensor, nn

import lorasb
from lorasb.kernels.launcher import observed

pytestmark = pytest.mark.usefixtures("grouped")

GROUPS = {"llama": [3, 2], "gemma2": [3, 2], "roberta": [3], "gpt2": []}


@pytest.mark.parametrize("family", GROUPS)
def test_patching_finds_the_groups_and_they_compute_what_single_layers_do(family: str) -> None:
    model = patched(family)
    sizes = [len(group.members) for group in groups(model)]
    assert sizes == GROUPS[family] * 2
    if family != "gpt2":
        same(step(model, family), step(alone(model), family))
        assert [len(group.members) for group in groups(model)] == sizes


def test_a_llama_block_takes_eight_launches() -> None:
    model = patched("llama", target_modules="all-linear")
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 20, 64, requires_grad=True)
    rotary = model.base_model.model.model.rotary_emb(x, torch.arange(20)[None])
    counts, results = {}, {}
    for name, one in (("grouped", block), ("alone", alone(block))):
        with lorasb.backend("triton"), observed() as launches:
            y = one(x, position_embeddings=rotary)
            forward = len(launches)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        counts[name] = forward, len(launches) - forward
        results[name] = y.detach(), gradient
    assert counts == {"grouped": (8, 8), "alone": (14, 14)}
    for got, want in zip(*results.values(), strict=True):
        tolerances.check(got, want, tolerances.fp32(1000))


def test_a_grouped_model_by_the_kernels_is_the_model_alone() -> None:
    model = patched("llama")
    same(step(model, backend="triton"), step(alone(model)))


@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding_is_grouped(tokens: int) -> None:
    model = patched("llama").eval()
    ids = torch.randint(3, 99, (1, tokens))
    with torch.no_grad(), lorasb.backend("triton"), observed() as launches:
        got = model(input_ids=ids).logits
    assert len(launches) == 2 * 8
    with torch.no_grad():
        tolerances.check(got, alone(model)(input_ids=ids).logits, tolerances.PROCESS_SUMS)


def test_with_dropout_each_member_has_the_mask_that_it_has_alone() -> None:
    model = patched("llama", lora_dropout=0.5)
    apart = alone(model)
    logits = []
    with lorasb.backend("triton"):
        for one in (model.train(), apart.train()):
            torch.manual_seed(0)
            with observed() as launches:
                logits.append(one(**batches_for("llama", count=1)[0]).logits)
            logits[-1].sum().backward()
    assert len(launches) == 28  # alone
    with lorasb.backend("triton"), observed() as launches:
        model(**batches_for("llama", count=1)[0])
    assert len(launches) == 16
    tolerances.check(*logits, tolerances.EXACT)
    cores = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, apart)]
    assert cores[0].keys() == cores[1].keys()
    for name, grad in cores[0].items():
        tolerances.check(grad, cores[1][name], tolerances.PROCESS_SUMS)


class TestStaysAlone:
    def test_a_layer_that_gets_another_tensor_leaves(self) -> None:
        model = patched("llama")
        part = attention(model)
        part.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
        want = step(alone(model))
        same(step(model), want)

    def test_a_group_splits_by_what_its_layers_read(self) -> None:
        """A cross-attention: q reads one tensor, k and v another."""

        class Cross(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor, memory: Tensor) -> Tensor:
                return self.q_proj(x) + self.k_proj(memory) + self.v_proj(memory)

        model = prepared(Cross(), 16)
        cross = model.base_model.model
        x, memory = torch.randn(3, 16), torch.randn(3, 16)
        want = alone(cross)(x, memory)
        for _ in range(3):
            tolerances.check(cross(x, memory), want, tolerances.fp32(16))
        assert [len(group.members) for group in groups(model)] == [2]
        assert cross.q_proj.siblings is None
        assert cross.k_proj.siblings is cross.v_proj.siblings

    def test_a_tensor_changed_in_place_is_another(self) -> None:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate_proj, self.up_proj = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                gate = self.gate_proj(x)
                x.mul_(2.0)
                return gate + self.up_proj(x)

        model = prepared(Changing(), 16)
        x = torch.randn(3, 16)
        want = alone(model.base_model.model)(x.clone())
        tolerances.check(model.base_model.model(x.clone()), want, tolerances.fp32(16))
        assert groups(model) == []

    def test_a_layer_that_is_skipped_leaves(self) -> None:
        class Skipping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.q_proj(x) + self.v_proj(x)

        model = prepared(Skipping(), 16)
        x = torch.randn(3, 16)
        want = alone(model.base_model.model)(x)
        for _ in range(2):
            tolerances.check(model.base_model.model(x), want, tolerances.fp32(16))
        assert [len(group.members) for group in groups(model)] == [2]

    @pytest.mark.parametrize("case", ["disabled", "merged", "another adapter", "hook", "other rank", "inference"])
    def test_states_that_keep_layers_alone_compute_the_same(self, case: str) -> None:
        model = patched(
            "llama",
            **({"rank_pattern": {"k_proj": 2}} if case == "other rank" else {}),
        )
        apart = alone(model)
        for one in (model, apart):
            prepare(one, case)
        with torch.inference_mode(case == "inference"), lorasb.backend("triton"), observed() as launches:
            torch.manual_seed(0)
            got = model(**batches_for("llama", count=1)[0]).logits
            count = len(launches)
            torch.manual_seed(0)
            want = apart(**batches_for("llama", count=1)[0]).logits
        tolerances.check(got, want, tolerances.PROCESS_SUMS)
        expected = {"disabled": 0, "merged": 0, "another adapter": 16, "other rank": 20, "hook": 24}
        assert count == expected.get(case, 28)

    def test_a_layer_called_outside_of_its_parent_computes_alone(self) -> None:
        model = patched("llama")
        x = torch.randn(2, 64)
        part = attention(model)
        y = part.q_proj(x)
        assert not part.q_proj.siblings._forwards
        assert torch.equal(y, alone(model).base_model.model.model.layers[0].self_attn.q_proj(x))


def prepare(model: nn.Module, case: str) -> None:
    model.eval()
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    elif case == "merged":
        model.merge_adapter()
    elif case == "another adapter":
        torch.manual_seed(1)
        model.add_adapter("other", lorasb.LoRASBConfig(r=4))
        model.set_adapter("other")
        lorasb.initialize(model, batches_for("llama"), lr=3e-2, progress=False)
    elif case == "hook":
        for layer in model.base_model.model.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda *_: None)
            layer.mlp.up_proj.register_forward_hook(lambda *_: None)


class Cross(nn.Module):
    """Attention's projections where q reads one input and k and v another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.q_proj(x).tanh() * self.k_proj(memory).tanh() + self.v_proj(memory)


def test_layers_that_read_another_input_are_separated_after_a_checkpointed_step() -> None:
    """Not within it: backward repeats its forward, which has to save the tensors that it saved the first time."""
    torch.manual_seed(0)
    x, memory = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    cross = prepared(Cross(), 16)
    plain = alone(cross)
    plain(x, memory).square().sum().backward()
    want = {n: p.grad for n, p in plain.named_parameters() if "lorasb_R" in n}
    for sizes in ([3], [2], [2]):
        cross.zero_grad()
        torch.utils.checkpoint.checkpoint(cross, x, memory, use_reentrant=False).square().sum().backward()
        for name, gradient in want.items():
            tolerances.check(cross.get_parameter(name).grad, gradient, tolerances.PROCESS_SUMS)
        assert [len(group.members) for group in groups(cross)] == sizes


@pytest.mark.parametrize(
    ("group", "gpu", "formed"), [(None, False, 0), (None, True, 4), (True, False, 4), (False, True, 0)]
)
def test_groups_are_formed_where_they_pay_or_are_asked_for(
    group: bool | None, gpu: bool, formed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the fixture above
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = patched("llama", target_modules="all-linear", group=group)
    assert len(groups(model)) == formed
    config = model.peft_config["default"].to_dict()
    assert config["group"] is group  # and in no file, as machines differ
    model.add_adapter("second", lorasb.LoRASBConfig(r=3, target_modules="all-linear", group=None if group else group))
    assert len(groups(model)) == formed
